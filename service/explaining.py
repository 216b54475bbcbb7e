"""What is wrong with a mapping, key by key, for people; an unknown key comes with the one that was meant."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from service.errors import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)
# Where a part of a request comes from, as pydantic's first word of a place says; people need not read that.
_SOURCES = ("body", "query", "path", "header", "cookie")
_SHOWN = 80
_AS_JSON = "it is JSON, with the header Content-Type: application/json"
# Lines that are told of what is wrong: nobody reads more, and each of ten thousand unknown keys takes its time.
LINES_MOST = 50


def validated(kind: type[_Model], values: Mapping[str, Any], source: str) -> _Model:
    """`values` as this model; raises ConfigError that lists all that is wrong, after `source`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = explained(error.errors(), kind).splitlines()
        raise ConfigError(f"{source}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def explained(problems: Iterable[Any], kind: Any = None) -> str:
    """Pydantic's findings, a line each: which field, what is wrong, what would work; `LINES_MOST` of them.

    Args:
        kind: the model that was filled; without it an unknown key gets no suggestion.
    """
    found = list(problems)
    lines = list(dict.fromkeys(_line(problem, kind) for problem in found[:LINES_MOST]))
    if len(found) > LINES_MOST:
        lines.append(f"and {len(found) - LINES_MOST:,} more")
    return "\n".join(lines)


def _line(problem: Any, kind: Any) -> str:
    place = problem["loc"]
    if place and place[0] in _SOURCES and len(place) > 1:
        place = place[1:]
    elif place == ("body",):
        if problem["type"] == "missing":
            return f"the body is missing; {_AS_JSON}"
        if isinstance(problem["input"], bytes):
            # What curl -d sends calls itself a form.
            return f"the body was not read; {_AS_JSON}"
        place = ("the body",)
    where = ".".join(str(part) for part in place if part != "[key]")
    if problem["type"] == "missing":
        return f"{where}: is missing"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_meant(place, kind)}"
    message = problem["msg"].removeprefix("Value error, ")
    if not where:
        return str(message)
    given = repr(problem["input"])
    tail = "" if isinstance(problem["input"], dict | list) or len(given) > _SHOWN else f" (given: {given})"
    return f"{where}: {message}{tail}"


def _meant(place: tuple[Any, ...], kind: Any) -> str:
    model = _model_in(kind)
    if model is None:
        return "leave it away"
    section, *path = model, *place[:-1]
    for part in path:
        field = section.model_fields.get(str(part))
        section = (_model_in(field.annotation) if field else None) or section
    wrong, here = str(place[-1]), list(section.model_fields)
    if near := difflib.get_close_matches(wrong, here, n=1):
        return f"did you mean {'.'.join([*map(str, path), near[0]])!r}?"
    if elsewhere := [key for key in _keys(model) if key.rpartition(".")[2] == wrong]:
        return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    return "known here: " + ", ".join(here)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        nested = _model_in(field.annotation)
        if nested is None:
            yield prefix + name
        else:
            yield from _keys(nested, f"{prefix}{name}.")


def _model_in(kind: Any) -> type[BaseModel] | None:
    parts = (kind, *get_args(kind))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)
