"""YAML as somebody types it: its values, or where it is wrong, and on which line a key stands."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

# Deeper than any configuration; Python's own stack ends far beyond it.
_DEEPEST = 40


@dataclass(frozen=True)
class YamlText:
    """A text that was read.

    Attributes:
        values: the mapping; empty if there is none or it is wrong.
        problem: what is wrong with it as YAML; "" if nothing is.
        line: of the problem, from 1; 0: of no certain line.
        node: the tree with its lines; None without one.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    line: int = 0
    node: yaml.Node | None = None

    def line_of(self, path: Sequence[str]) -> int:
        """The line of the key that `path` leads to, or of the last one on the way; 0 if not even the first is here."""
        node, line = self.node, 0
        for part in path:
            if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
                node = node.value[int(part)]
                line = node.start_mark.line + 1
                continue
            if not isinstance(node, yaml.MappingNode):
                break
            found = next((pair for pair in node.value if getattr(pair[0], "value", None) == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        return line


def read(text: str) -> YamlText:
    """Read a mapping. Safe types only; no key twice, no `extends`, no aliases: they can grow without bounds."""
    try:
        problem, line = unbounded(text)
        if problem:
            return YamlText(problem=problem, line=line)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return YamlText()
        if not isinstance(node, yaml.MappingNode):
            return YamlText(problem="a configuration is a mapping of keys to values, as `duration: 8 epochs`", line=1)
        if twice := _given_twice(node):
            return YamlText(problem=f"{twice.value}: is given twice", line=twice.start_mark.line + 1, node=node)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return YamlText(problem=f"not valid YAML: {error.problem or error.context}", line=mark.line + 1 if mark else 0)
    except (yaml.YAMLError, ValueError) as error:
        return YamlText(problem=f"not valid YAML: {' '.join(str(error).split())}")
    result = YamlText(values, node=node)
    if found := not_plain(values):
        path, told = found
        return YamlText(problem=told, line=result.line_of(path), node=node)
    if "extends" in values:
        told = "extends: reads a file, which a pasted text may not; choose that configuration above"
        return YamlText(problem=told, line=result.line_of(["extends"]), node=node)
    return result


def unbounded(text: str) -> tuple[str, int]:
    """What would make the text's values grow without bounds, and its line; ("", 0) if nothing does.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if event.start_mark else 0
        if depth > _DEEPEST:
            return f"is nested more than {_DEEPEST} deep", line
        if isinstance(event, yaml.AliasEvent):
            return f"*{event.anchor}: aliases are not taken here; write the value out", line
    return "", 0


def not_plain(value: Any, path: tuple[str, ...] = ()) -> tuple[tuple[str, ...], str] | None:
    """The path of the first value that JSON cannot hold, as a date, and what to do; None if all of them are plain."""
    where = ".".join(path)
    if isinstance(value, dict):
        for key, below in value.items():
            if not isinstance(key, str):
                return path, f"{where + ': ' if where else ''}the key {key!r} is no text; put it in quotes"
            if found := not_plain(below, (*path, key)):
                return found
    elif isinstance(value, list):
        for index, below in enumerate(value):
            if found := not_plain(below, (*path, str(index))):
                return found
    elif isinstance(value, float) and not math.isfinite(value):
        return path, f"{where}: {value} is no number to train with"
    elif value is not None and not isinstance(value, str | int | float):
        return path, f"{where}: YAML reads this as a {type(value).__name__}; put it in quotes"
    return None


def _given_twice(node: yaml.Node) -> yaml.ScalarNode | None:
    if isinstance(node, yaml.SequenceNode):
        return next(filter(None, map(_given_twice, node.value)), None)
    if not isinstance(node, yaml.MappingNode):
        return None
    seen = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                return key
            seen.add(key.value)
        if below := _given_twice(value):
            return below
    return None


__all__ = ["YamlText", "not_plain", "read", "unbounded"]
