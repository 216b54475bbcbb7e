"""Augmentations, found by their file's name. Each samples operations and their amounts per image; no more.

A module offers `Augmentation`, a frozen dataclass of the augmentation's options with `slots` and
`sample(seed, epochs, ids, size) -> (ops (N, K) int64, amounts (N, K, 4) float32)`, K = len(slots). What the codes and
amounts mean is said in `operations`.
"""

import dataclasses
import importlib
import pkgutil
from typing import Any, Protocol

import numpy as np

from pipelines.augment.operations import Operation
from pipelines.errors import LorotError

# What lies beside the augmentations and is none.
_PARTS = frozenset({"operations", "levels"})


class Augmentation(Protocol):
    """What an augmentation module's `Augmentation` looks like."""

    @property
    def slots(self) -> tuple[frozenset[Operation], ...]:
        """The operations that may stand at each of its K places; NOTHING may stand at any."""
        ...

    def sample(
        self, seed: int, epochs: int | np.ndarray, ids: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]: ...


def available() -> tuple[str, ...]:
    """Names of all augmentations."""
    return tuple(sorted({module.name for module in pkgutil.iter_modules(__path__)} - _PARTS))


def load(name: str, **options: Any) -> Augmentation:
    """The augmentation `name` with its options (a list stands for a pair); raises LorotError that names what exists."""
    if name not in available():
        raise LorotError(f"augmentation {name!r} does not exist; there are {', '.join(available())}")
    kind = importlib.import_module(f"{__name__}.{name}").Augmentation
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    given = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    for option, value in given.items():
        if option not in known:
            raise LorotError(f"augmentation {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}")
        if not _resembles(value, known[option]):
            raise LorotError(f"{name} {option}: {value!r} is not of the kind of {known[option]!r}, the default")
    augmentation: Augmentation = kind(**given)
    return augmentation


def _resembles(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        pairs = zip(value, default, strict=True) if isinstance(value, tuple) and len(value) == len(default) else None
        return pairs is not None and all(_resembles(*pair) for pair in pairs)
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
