"""Data sets, found by their file's name. Each turns a folder on disk into a `Manifest`, and nothing else.

A data set module offers `load(root, split, **options) -> Manifest`; its options are the function's keyword-only
parameters, and its docstring says where the files come from. Manifests are kept in `root/.lorot` and rebuilt when the
files they were made from change. Importing this package imports no data set and no torch.
"""

import difflib
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipelines.errors import DataError

if TYPE_CHECKING:
    from pipelines.manifest import Manifest


def available() -> tuple[str, ...]:
    """Names of all data sets."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def options(name: str) -> dict[str, Any]:
    """The options of data set `name` with their defaults; raises DataError as `load` does."""
    parameters = inspect.signature(_module(name).load).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def load(name: str, root: Path | str, split: str, **given: Any) -> "Manifest":
    """The manifest of `split` ("train", "val", ...) of data set `name` in folder `root`.

    Raises:
        DataError: no such data set, split or option (the message lists those there are), or the files are missing,
            empty or damaged (it says what would work).
    """
    known = options(name)
    for option in given:
        if option not in known:
            raise DataError(
                f"data set {name!r} has no option {option!r}{_nearest(option, tuple(known))}; "
                f"it has {', '.join(known) or 'none'}"
            )
    manifest: Manifest = _module(name).load(root if "://" in str(root) else Path(root), split, **given)
    return manifest


def _module(name: str) -> ModuleType:
    if name not in available():
        raise DataError(
            f"data set {name!r} does not exist{_nearest(name, available())}; there are {', '.join(available())}"
        )
    return importlib.import_module(f"{__name__}.{name}")


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
