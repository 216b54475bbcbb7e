"""What the record keeps of an attempt that has ended: late records, its log, what a container has made. No torch."""

import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from service import artifact_places, plain_files, recovery, store
from service.errors import LorotError
from service.jobs import orders
from service.jobs.job import Attempt, Job
from service.jobs.record import Record
from service.jobs.settings import ServiceSettings

_log = logging.getLogger(__name__)

_LOG_BYTES = 8 << 20
_SAID_BYTES = 32 << 10
_NOTE_BYTES = 1 << 20
_SAID_CHARS = 1000


class BusyError(Exception):
    """Something of the attempt is not over yet, or a store does not answer: come back later."""


def send_records(job: Job, settings: ServiceSettings, uri: str) -> None:
    """Send what the attempt's workers could not; end their run's record if nobody could.

    Raises:
        TrackingError: the server does not answer.
        BusyError: processes of the attempt are still about to end; or what waits there cannot be read or sent.
    """
    run = orders.folder_of(settings, job.id) / orders.RUN
    if not any(run.glob("spool*.jsonl")):
        return
    try:
        # Workers in containers know the server by another address.
        recovery.sync_foreign(run, uri, job.id, artifact_places.absolute(settings.artifact_roots))
    except store.UnreachableError:
        raise
    except (LorotError, OSError) as error:
        raise BusyError(str(error)) from error


def keep(job: Job, settings: ServiceSettings, record: Record) -> None:
    """Upload the configuration, the newest attempt's logs, and the declared outputs of a container.

    Raises:
        TrackingError: the server does not answer.
        PlaceError: artifacts of this run may not be written.
        BusyError: it, or the store of artifacts, does not take them.
    """
    folder = orders.folder_of(settings, job.id)
    try:
        _keep_copy(job, record, folder, orders.CONFIGURATION)
        if job.attempt is not None:
            _keep_logs(job, job.attempt, settings, record)
        for path in outputs(job, folder / orders.OUTPUTS):
            below = path.parent.relative_to(folder).as_posix()
            record.upload(job.id, path, below)
    except (store.UnreachableError, artifact_places.PlaceError):
        raise
    # What a store of artifacts raises is its client library's.
    except Exception as error:
        raise BusyError(" ".join(str(error).split())[:300]) from error


def outputs(job: Job, folder: Path) -> Iterator[Path]:
    """The files that a container was to leave, as far as they are there: plain ones, no link on the way to them."""
    for name in job.spec.outputs:
        # As the container sees it: /results/model.bin is model.bin.
        parts = PurePosixPath(re.sub(r"^/results(/|$)", "", name)).parts
        if any(part in ("..", "/") for part in parts):
            _log.warning("job %s: output %r leads out of /results and is not kept", job.id, name)
            continue
        yield from _plain(folder, parts)


def said(job: Job, attempt: Attempt, settings: ServiceSettings) -> str:
    """What an attempt of `lorot` has said of its failure: the last error in its log, or its workers' error.json."""
    if job.spec.kind == "container":
        return ""
    folder = orders.folder_of(settings, job.id)
    try:
        last, _ = plain_files.end(folder, f"{orders.ATTEMPTS}/{attempt.number}/log-node0.txt", _SAID_BYTES)
        found = re.findall(r"^error: (.+)$", last.decode(errors="replace"), re.MULTILINE)
    except OSError:
        found = []
    if found:
        return str(found[-1])[:_SAID_CHARS]
    told = _noted(folder, "error.json", attempt).get("message")
    return told.splitlines()[0][:_SAID_CHARS] if isinstance(told, str) and told else ""


def is_done(job: Job, attempt: Attempt, settings: ServiceSettings) -> bool:
    """Whether the workers of an attempt of `lorot` have noted that all is done; nobody may have seen their end."""
    if job.spec.kind == "container" or not attempt.started_s:
        return False
    return bool(_noted(orders.folder_of(settings, job.id), "end.json", attempt).get("time_ns"))


def _noted(folder: Path, name: str, attempt: Attempt) -> dict[str, Any]:
    """What a file of the run folder says that was written since the attempt was started; empty without one."""
    try:
        with plain_files.reading(folder, f"{orders.RUN}/{name}") as file:
            is_its_own = os.fstat(file.fileno()).st_mtime >= attempt.started_s - 1
            found = json.loads(file.read(_NOTE_BYTES)) if is_its_own else None
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep_logs(job: Job, attempt: Attempt, settings: ServiceSettings, record: Record) -> None:
    folder = orders.folder_of(settings, job.id)
    below = f"{orders.ATTEMPTS}/{attempt.number}"
    for path in sorted((folder / below).glob("log-node*.txt")):
        _keep_copy(job, record, folder, f"{below}/{path.name}")


def _keep_copy(job: Job, record: Record, folder: Path, name: str) -> None:
    """Upload a copy of what a regular file holds, or of its end: the file itself would be opened by its name."""
    try:
        content, before = plain_files.end(folder, name, _LOG_BYTES)
    except OSError:
        return
    note = f"[{before} bytes before this are left out]\n".encode() if before else b""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / PurePosixPath(name).name
        copy.write_bytes(note + content)
        above = PurePosixPath(name).parent.as_posix()
        record.upload(job.id, copy, None if above == "." else above)


def _plain(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """The regular files at or below folder/parts; links are not followed, neither on the way nor below."""
    path = folder
    for part in ("", *parts):
        path = path / part
        try:
            mode = path.lstat().st_mode
        except OSError:
            return
        if stat.S_ISLNK(mode):
            _log.warning("%s is a link and is not kept", path)
            return
    if path.is_file():
        yield path
        return
    for here, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            if stat.S_ISREG((file := Path(here) / name).lstat().st_mode):
                yield file
