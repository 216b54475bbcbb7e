"""The loaders that are compared, a file for each library, found by its name.

A module offers

- `ROWS`: the lines that it adds to the table;
- `FOREIGN`: whether it runs in the environment of the other libraries (`.bench`) and not in the project's own;
- `batches(row, folder, job)`: batches without end of (N, 3, size, size) float32, torch or numpy, in any memory layout;
- `write(form, source, target)`, if a row has a form of its own: makes it from the class folders of JPEGs below
  `source/train`, into the empty folder `target`.

Every loader draws RandomResizedCrop (scale 0.08 to 1, ratio 3/4 to 4/3, antialiased bilinear), mirrors half of the
images and normalises, in the way its own documentation shows as the fast one.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: for `--only` and the results' file.
        title: for people.
        form: how the corpus lies on disk: "files", "files256" (short side 256), or one that the module writes.
        options: for the module's `batches`.
        renders: whether finished batches come out, whose content can be checked.
        source: what the module's `write` makes the form from, "files" or "files256".
        stored: how large the images are stored, "full" or "256": only alike ones are compared for sharpness.
    """

    name: str
    title: str
    form: str = "files"
    options: dict[str, Any] = field(default_factory=dict)
    renders: bool = True
    source: str = "files"
    stored: str = "full"


@dataclass(frozen=True)
class Job:
    """What every loader is asked for."""

    batch: int = 256
    size: int = 224
    cores: int = 2
    seed: int = 0
    check: bool = False


def files(folder: Path) -> list[Path]:
    """The JPEGs of a folder of class folders, in an order that is the same everywhere and mixes the classes."""
    found = sorted(folder.glob("train/*/*.jpg"))
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))]


def load(name: str) -> ModuleType:
    """The module of that name."""
    return importlib.import_module(f"{__name__}.{name}")


def available() -> dict[str, tuple[str, Row, bool]]:
    """Row name -> (module, row, foreign), in the order of the files' names. Imports none of the libraries."""
    rows = {}
    for found in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = load(found)
        for row in module.ROWS:
            assert row.name not in rows, f"two rows are named {row.name}"
            rows[row.name] = (found, row, module.FOREIGN)
    return rows
