"""What of jobs is shown to people: files that may leave their folder, and jobs side by side. Imports no torch."""

import math
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
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
# What a comparison's `configurations` say of a job. All but the first are what is shown for a value that nobody knows.
RESOLVED, NOT_RECORDED, NO_ANSWER, NONE = "resolved", "not recorded", "not known now", "no configuration"
_REASONS = {
    NOT_RECORDED: "it is not recorded what it was resolved to",
    NO_ANSWER: "MLflow does not say just now what it was resolved to",
}


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


def compare(
    jobs: Sequence[Job],
    histories: Sequence[Sequence[dict[str, float]]],
    resolved: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Settings that differ, the last value of each metric, and its best where one is better; a column for each job.

    Args:
        histories: of each job its measurements.
        resolved: by id what jobs were resolved to, where that is recorded; None: nobody says just now.

    Returns:
        {"jobs": [ids], "names": [of each], "configurations": [of each what its settings below `config.` are: RESOLVED,
        or why they are as it was submitted], "settings": {key: [value of each, None: it has none]}, "metrics": {name:
        [last value of each, or None]}, "best": the same of those metrics of which it is known which way is better}
    """
    told = [_told(job, resolved) for job in jobs]
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
        "configurations": told,
        "settings": _settings(jobs, resolved or {}, told),
        "metrics": {name: [column[name][-1] if name in column else None for column in columns] for name in names},
        "best": {
            name: [_best(choose, column.get(name, ())) for column in columns]
            for name in names
            if (choose := better(name)) is not None
        },
    }


def stand_in(key: str, told: str) -> str:
    """What to show where a job, of whose configuration this is told, has no value of a setting; "": it is not set."""
    return told if told != RESOLVED and key.startswith("config.") else ""


def caveats(found: Mapping[str, Any]) -> list[str]:
    """Of each job in a comparison that is not compared by what it was resolved to, why; for people."""
    about = zip(found["jobs"], found["names"], found["configurations"], strict=True)
    return [
        f"{name} ({job_id[:12]}): {_REASONS[told]}; its configuration is as it was submitted, without defaults"
        for job_id, name, told in about
        if told in _REASONS
    ]


def _told(job: Job, resolved: Mapping[str, Any] | None) -> str:
    if job.spec.kind == "container":
        return NONE
    if resolved is None:
        return NO_ANSWER
    return RESOLVED if job.id in resolved else NOT_RECORDED


def _settings(
    jobs: Sequence[Job], resolved: Mapping[str, Mapping[str, Any]], told: Sequence[str]
) -> dict[str, list[str | None]]:
    submitted = [_flat(job, job.spec.config) for job in jobs]
    columns = [_flat(job, resolved.get(job.id, job.spec.config)) for job in jobs]
    rows = {}
    for key in dict.fromkeys(key for column in columns for key in column):
        row = [column.get(key) for column in columns]
        alike = {value for value, one in zip(row, told, strict=True) if not stand_in(key, one)}
        # What was asked for may be written otherwise than what that is resolved to: it is compared with its like.
        if len(alike) > 1 or (len(set(row)) > 1 and len({column.get(key) for column in submitted}) > 1):
            rows[key] = row
    return rows


def _flat(job: Job, config: Mapping[str, Any]) -> dict[str, str]:
    spec = job.spec.model_dump(mode="json", exclude={"config"})
    return flatten(spec | ({"config": config} if config else {}))


def _best(choose: Callable[[Iterable[float]], float], values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return choose(finite) if finite else None
