"""What `lorot train --help` says of a configuration: every key, its type, default and meaning, by section."""

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from service.config import JobConfig, subsection
from service.duration import Duration


def describe(section: type[BaseModel] = JobConfig, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted key, type, default, meaning) of every key."""
    for name, field in section.model_fields.items():
        nested = subsection(field.annotation)
        if nested is not None:
            yield from describe(nested, f"{prefix}{name}.")
        else:
            yield prefix + name, type_name(field.annotation), _shown(field.default), field.description or ""


def type_name(kind: Any) -> str:
    """A type as people write it: `int|null`, `dali|torch`, `duration`, `[float, float]`."""
    origin, parts = get_origin(kind), get_args(kind)
    if hasattr(kind, "__metadata__"):
        return type_name(parts[0])
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return "|".join("null" if part is type(None) else type_name(part) for part in parts)
    if origin is tuple:
        return f"[{', '.join('...' if part is ... else type_name(part) for part in parts)}]"
    if kind is Duration:
        return "duration"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"{{{', '.join(kind.model_fields)}}}"
    return {"dict": "mapping", "str": "text"}.get(name := getattr(origin or kind, "__name__", str(kind)), name.lower())


def print_keys(console: Console) -> None:
    """Print all keys of a configuration, one table a section."""
    console.print(
        "[bold]Configuration keys[/bold], in the file or as key.sub=value; a duration is '90 epochs', '5000 steps', "
        "'1e6 samples' or '5 %'"
    )
    tables: dict[str, Table] = {}
    for key, kind, default, meaning in describe():
        section = key.rpartition(".")[0]
        if section not in tables:
            tables[section] = Table(
                title=_title(section), title_justify="left", show_edge=False, pad_edge=False, expand=True
            )
            for heading, ratio in (("key", 3), ("type", 2), ("default", 2), ("meaning", 6)):
                tables[section].add_column(heading, ratio=ratio, overflow="fold")
        tables[section].add_row(key, kind.replace("|", " | "), default, meaning)
    for table in tables.values():
        console.print()
        console.print(table, markup=False)


def _title(section: str) -> str:
    model: type[BaseModel] = JobConfig
    off = ""
    for part in filter(None, section.split(".")):
        field = model.model_fields[part]
        model, off = subsection(field.annotation) or model, " (off unless given)" if field.default is None else ""
    return f"{section or 'job'}: {(model.__doc__ or '').splitlines()[0]}{off}"


def _shown(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, tuple):
        return f"[{', '.join(_shown(value) for value in default)}]"
    if isinstance(default, float):
        return f"{default:.4g}"
    return str(default).lower() if isinstance(default, bool) else str(default)
