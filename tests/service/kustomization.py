"""Builds a kustomization as far as deploy/ uses it, and refuses whatever else it finds there."""

from pathlib import Path
from typing import Any

import yaml

_KNOWN = {"apiVersion", "kind", "resources", "configMapGenerator", "generatorOptions"}


def build(folder: Path) -> list[dict[str, Any]]:
    """All documents of a kustomization, those that it takes in first."""
    (about,) = _read(folder / "kustomization.yaml")
    assert about["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    assert about["kind"] == "Kustomization"
    assert not about.keys() - _KNOWN, f"{folder}: this reader does not know {about.keys() - _KNOWN}"
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
    used = {
        *about["resources"],
        "kustomization.yaml",
        *(n for m in about.get("configMapGenerator", []) for n in m["files"]),
    }
    assert not {path.name for path in folder.iterdir() if path.is_file()} - used, (
        f"{folder} has files that nothing names"
    )
    names = [
        (document["kind"], document["metadata"].get("namespace"), document["metadata"]["name"]) for document in found
    ]
    assert len(set(names)) == len(names), "an object is there twice"
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]
