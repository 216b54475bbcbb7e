"""Configuration files: YAML mappings that extend one another, and overrides from the command line."""

import contextlib
import sysconfig
from pathlib import Path
from typing import Any

import yaml

from service.errors import ConfigError


def shipped(name: str) -> Path:
    """A configuration that comes with the program, as downstream/coco-retinanet.yaml: the checkout's or the installed.

    Raises:
        ConfigError: it is not there.
    """
    places = (
        Path(__file__).resolve().parents[1] / "configs" / name,
        Path(sysconfig.get_path("data")) / "share" / "lorot" / "configs" / name,
    )
    for place in places:
        if place.is_file():
            with contextlib.suppress(ValueError):
                return place.relative_to(Path.cwd())
            return place
    raise ConfigError(f"no {name} at {' or '.join(map(str, places))}; reinstall lorot")


class _Loader(yaml.SafeLoader):
    """YAML's safe subset; a key that is given twice is an error, where plain YAML keeps the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, on top of the one its `extends:` (a path relative to the file) names."""
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: `extends` goes in a circle")
    try:
        values = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read this configuration ({error.strerror}); configs/ holds examples"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}; a configuration is a mapping of keys to values")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    return merge(read(path.parent / str(parent), (*_seen, path.resolve())), values)


def _parse(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """`upper` on top of `lower`, mapping by mapping."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def assign(values: dict[str, Any], override: str) -> None:
    """Put one `key.sub=value` (the value is YAML) into `values`, in place; raises ConfigError if it fits nowhere."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key.sub=value, as in optimizer.lr=0.05")
    try:
        value = _parse(text)
    except (yaml.YAMLError, ValueError):
        value = text
    *path, last = key.split(".")
    for name in path:
        below = values.setdefault(name, {})
        if below is None:
            below = values[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {name!r} holds a value, not a block of keys")
        values = below
    values[last] = value
