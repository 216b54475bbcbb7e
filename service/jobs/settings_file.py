"""The job service's settings: a YAML file with overrides on top. Imports no torch."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service import config_file
from service.errors import ConfigError
from service.jobs.settings import ServiceSettings


def load(path: Path | None, overrides: Sequence[str] = ()) -> ServiceSettings:
    """The settings in `path` (None: the defaults), with `key.sub=value` overrides on top.

    Raises:
        ConfigError: the file cannot be read; a key is unknown or a value wrong: every one of them.
    """
    values: dict[str, Any] = config_file.read(path) if path is not None else {}
    for override in overrides:
        config_file.assign(values, override)
    try:
        return ServiceSettings.model_validate(values)
    except ValidationError as error:
        told = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise ConfigError(f"{path or 'service settings'}:\n{told}") from None


def _explain(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_hint(problem['loc'])}"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')} (given: {problem['input']!r})"


def _hint(where: Sequence[Any]) -> str:
    *path, wrong = where
    section: Any = ServiceSettings
    for name in path:
        section = section.model_fields[name].annotation
    if near := difflib.get_close_matches(str(wrong), section.model_fields, n=1):
        return f"did you mean {'.'.join((*path, near[0]))!r}?"
    return "configs/service.yaml shows those there are, so does `lorot serve --help`"
