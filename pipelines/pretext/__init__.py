"""Pretext tasks, found by their file's name. Each samples a square box, quarter turns and a label per image; no more.

A task module offers `Task`, a frozen dataclass of the task's options with `num_labels` and
`sample(seed, epoch, ids, size, *, step=0) -> (boxes (N, 3) as (y, x, side), turns (N,), labels (N,))`, all int64,
and the same two names at the defaults for the module itself. `epoch` is a number or one per id. `step` matters only
to a task that draws once per batch. A label is 0 for a task without labels (`num_labels` 0).
"""

import dataclasses
import importlib
import pkgutil
from typing import Any, Protocol

import numpy as np

from pipelines.errors import LorotError


class PretextTask(Protocol):
    """What a pretext module's `Task` looks like."""

    @property
    def num_labels(self) -> int: ...

    def sample(
        self, seed: int, epoch: int | np.ndarray, ids: np.ndarray, size: int, *, step: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


def available() -> tuple[str, ...]:
    """Names of all pretext tasks."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str, **options: Any) -> PretextTask:
    """The task `name` with its options; raises LorotError that names what exists."""
    if name not in available():
        raise LorotError(f"pretext task {name!r} does not exist; there are {', '.join(available())}")
    task = importlib.import_module(f"{__name__}.{name}").Task
    known = [field.name for field in dataclasses.fields(task)]
    for option in options:
        if option not in known:
            raise LorotError(f"pretext task {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return task(**options)
