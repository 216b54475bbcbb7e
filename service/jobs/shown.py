"""What of jobs is shown to people: files that may leave their folder, and jobs side by side. Imports no torch."""

import math
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from service import plain_files
from service.errors import UnknownJobError
from service.jobs.job import Job
from service.jobs.orders import CONFIGURATION, RUN
from service.naming import flatten

# In the job's folder; anything else there is its own affair.
_FILES = (
    CONFIGURATION,
    f"{RUN}/config.yaml",
    f"{RUN}/samples.png",
    f"{RUN}/report.html",
    f"{RUN}/summary.json",
    f"{RUN}/confusion.json",
    f"{RUN}/detect.json",
    f"{RUN}/segment.json",
    f"{RUN}/left_out.json",
    f"{RUN}/error.json",
)
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# How metrics begin of which more is better.
_SCORES = ("top1", "top5", "gt_known", "AP", "max_box_acc")


def files(folder: Path) -> dict[str, Path]:
    """Name -> path of what there is: plain files of the folder itself, no links."""
    found = {}
    for name in _FILES:
        path = folder / name
        if is_plain(path, folder):
            found[path.name] = path
    if (folder / RUN).is_dir() and not (folder / RUN).is_symlink():
        for path in sorted((folder / RUN).iterdir()):
            if path.suffix in _PICTURES and is_plain(path, folder):
                found[path.name] = path
    return found


def opened(folder: Path, name: str) -> BinaryIO:
    """One of the files that `files` lists; raises UnknownJobError if there is none of this name.

    Of the list only the name is used: the job may have put a link there since.
    """
    found = files(folder)
    try:
        if name in found:
            return plain_files.reading(folder, found[name].relative_to(folder).as_posix())
    except OSError:
        del found[name]
    known = ", ".join(sorted(found)) or "none yet"
    raise UnknownJobError(f"job {folder.name} has no file {name!r}; there are {known}")


def configuration(folder: Path) -> dict[str, Any]:
    """What a job's job.yaml holds; empty if there is none, or it cannot be read."""
    try:
        content = yaml.safe_load(plain_files.text(folder, CONFIGURATION))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def is_plain(path: Path, folder: Path) -> bool:
    """Whether it is a regular file below `folder`, with no symbolic link on the way there."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        return path.resolve() == folder.resolve() / path.relative_to(folder)
    except (OSError, ValueError):
        return False


def better(name: str) -> Callable[[Iterable[float]], float] | None:
    """`min` or `max`: which value of a metric is the better one; None where neither is, or nobody can say."""
    last = re.split(r"[/.@:]", name)
    if any(part.endswith("loss") for part in last):
        return min
    is_score = any(part.startswith(_SCORES) or part.endswith("accuracy") for part in last)
    return max if is_score or name == "train/images_per_s" else None


def compare(jobs: Sequence[Job], histories: Sequence[Sequence[dict[str, float]]]) -> dict[str, Any]:
    """Settings that differ, the last value of each metric, and its best where one is better; a column for each job."""
    flat = [flatten(job.spec.model_dump(mode="json")) for job in jobs]
    keys = dict.fromkeys(key for values in flat for key in values)
    settings = {key: [values.get(key) for values in flat] for key in keys}
    # By metric, in the order of the steps.
    columns: list[dict[str, list[float]]] = []
    for history in histories:
        column: dict[str, list[float]] = {}
        for record in history:
            for key, value in record.items():
                if key not in ("step", "time_s"):
                    column.setdefault(key, []).append(value)
        columns.append(column)
    names = sorted({name for column in columns for name in column})
    return {
        "jobs": [job.id for job in jobs],
        "names": [job.spec.name for job in jobs],
        "settings": {key: row for key, row in settings.items() if len({str(value) for value in row}) > 1},
        "metrics": {name: [column[name][-1] if name in column else None for column in columns] for name in names},
        "best": {
            name: [_best(choose, column.get(name, ())) for column in columns]
            for name in names
            if (choose := better(name)) is not None
        },
    }


def _best(choose: Callable[[Iterable[float]], float], values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return choose(finite) if finite else None
