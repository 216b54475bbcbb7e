"""Builds a kustomization as far as deploy/ uses it, and refuses whatever else it finds there."""

from pathlib import Path
from typing import Any

import yaml

_KNOWN = {
    "Kustomization": {"apiVersion", "kind", "resources", "configMapGenerator", "generatorOptions", "components"},
    "Component": {"apiVersion", "kind", "resources", "patches"},
}
_VERSIONS = {"Kustomization": "kustomize.config.k8s.io/v1beta1", "Component": "kustomize.config.k8s.io/v1alpha1"}


def build(folder: Path) -> list[dict[str, Any]]:
    """All documents of a kustomization, those that it takes in first."""
    about = _about(folder, "Kustomization")
    found: list[dict[str, Any]] = []
    for name in about["resources"]:
        path = folder / name
        assert path.exists(), f"{folder}/kustomization.yaml names {name}, which is not there"
        found += build(path) if path.is_dir() else _read(path)
    for made in about.get("configMapGenerator", []):
        assert made.keys() == {"name", "namespace", "files"}
        assert about["generatorOptions"] == {"disableNameSuffixHash": True}
        data = {name: (folder / name).read_text() for name in made["files"]}
        metadata = {"name": made["name"], "namespace": made["namespace"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    used = {*about["resources"], *(n for m in about.get("configMapGenerator", []) for n in m["files"])}
    _assert_all_named(folder, used)
    for name in about.get("components", []):
        _change(found, folder / name)
    names = [_name(document) for document in found]
    assert len(set(names)) == len(names), "an object is there twice"
    return found


def _change(found: list[dict[str, Any]], folder: Path) -> None:
    """Let a component add its documents, and change those that it names."""
    about = _about(folder, "Component")
    patches = [patch["path"] for patch in about["patches"]]
    _assert_all_named(folder, {*about["resources"], *patches})
    for name in about["resources"]:
        found += _read(folder / name)
    for name in patches:
        (patch,) = _read(folder / name)
        (target,) = (document for document in found if _name(document) == _name(patch))
        _merge(target, patch)


def _merge(target: dict[str, Any], patch: dict[str, Any]) -> None:
    """As a strategic merge does where no list is one of objects."""
    for key, value in patch.items():
        assert not (isinstance(value, list) and any(isinstance(item, dict) for item in value)), key
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _about(folder: Path, kind: str) -> dict[str, Any]:
    (about,) = _read(folder / "kustomization.yaml")
    assert (about["kind"], about["apiVersion"]) == (kind, _VERSIONS[kind])
    assert not about.keys() - _KNOWN[kind], f"{folder}: this reader does not know {about.keys() - _KNOWN[kind]}"
    return dict(about)


def _assert_all_named(folder: Path, used: set[str]) -> None:
    left = {path.name for path in folder.iterdir() if path.is_file()} - used - {"kustomization.yaml"}
    assert not left, f"{folder} has files that nothing names: {left}"


def _name(document: dict[str, Any]) -> tuple[str, str | None, str]:
    return document["kind"], document["metadata"].get("namespace"), document["metadata"]["name"]


def _read(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]
