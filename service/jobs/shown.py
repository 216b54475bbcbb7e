"""What of jobs is shown to people: files that may leave their folder, and jobs side by side. Imports no torch."""

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

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


def is_plain(path: Path, folder: Path) -> bool:
    """Whether it is a regular file below `folder`, with no symbolic link on the way there."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        return path.resolve() == folder.resolve() / path.relative_to(folder)
    except (OSError, ValueError):
        return False


def compare(jobs: Sequence[Job], histories: Sequence[Sequence[dict[str, float]]]) -> dict[str, Any]:
    """Settings that differ and the last value of each metric, a column for each job."""
    flat = [flatten(job.spec.model_dump(mode="json")) for job in jobs]
    keys = dict.fromkeys(key for values in flat for key in values)
    settings = {key: [values.get(key) for values in flat] for key in keys}
    last: list[dict[str, float]] = []
    for history in histories:
        values: dict[str, float] = {}
        for record in history:
            values.update({key: value for key, value in record.items() if key not in ("step", "time_s")})
        last.append(values)
    names = sorted({name for values in last for name in values})
    return {
        "jobs": [job.id for job in jobs],
        "names": [job.spec.name for job in jobs],
        "settings": {key: row for key, row in settings.items() if len({str(value) for value in row}) > 1},
        "metrics": {name: [values.get(name) for values in last] for name in names},
    }
