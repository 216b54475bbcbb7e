"""The job service's settings: a YAML file with overrides on top. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service import config_file
from service.explaining import validated
from service.jobs.settings import ServiceSettings, complete


def load(path: Path | None, overrides: Sequence[str] = ()) -> ServiceSettings:
    """The settings in `path` (None: the defaults), with `key.sub=value` overrides on top.

    Raises:
        ConfigError: the file cannot be read; a key is unknown or a value wrong: every one of them.
    """
    values: dict[str, Any] = config_file.read(path) if path is not None else {}
    for override in overrides:
        config_file.assign(values, override)
    return validated(complete(), values, str(path or "service settings"))
