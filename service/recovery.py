"""What becomes of a run's records after its job: late ones are sent, and a run whose workers were killed is ended.

A job that ends by itself says so in its spool. One that was killed leaves a spool whose last status is RUNNING: whoever
finds it there and sees that the holder is gone writes the end in its place. The record names the holder, so that it has
no effect on a run that somebody else has gone on with in the meantime (see `service.delivery`).
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from service import holder, ownership, store
from service.artifact_places import Roots
from service.delivery import Delivery, StrictDelivery, take
from service.errors import ConfigError, LorotError, StorageError, TrackingError
from service.holder import Holder
from service.spool import Record, Sender, Spool, deliver_next

_log = logging.getLogger(__name__)

SPOOL = "spool.jsonl"
GONE = "its processes are gone, and none of them said why"
# Of a spool that foreign code has written; a year of a long job's records.
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Synced:
    """What was done about one run folder.

    Attributes:
        sent: records that the server got.
        ended: id of the run that was found dead and marked FAILED, or empty.
        problem: why records still wait there, or empty.
    """

    folder: Path
    sent: int = 0
    ended: str = ""
    problem: str = ""


def sync(folder: Path, uri: str | None = None) -> Synced:
    """Send what waits in a run's folder, of every run that was recorded there; end a run that was killed.

    Raises:
        TrackingError: nothing was ever recorded there, the job is still running, or the server does not take them.
        ConfigError: the job is still running, on another machine.
    """
    paths = sorted(folder.glob("spool*.jsonl"))
    if not paths:
        raise TrackingError(f"{folder}: no {SPOOL}; name the folder of a run, as in runs/train, or the folder of them")
    _refuse_if_running(folder)
    watched = ownership.refuse_if_owned(folder)
    sent, ended = 0, ""
    for path in paths:
        spool = Spool(path)
        try:
            if mark(spool, "FAILED", GONE, watched=watched):
                ended = str(spool.header().get("run_id", ""))
            sent += _send(spool, folder, uri)
        finally:
            spool.close()
    return Synced(folder, sent, ended)


def sync_foreign(folder: Path, uri: str, run_id: str, roots: Roots) -> Synced:
    """As `sync`, of a folder that foreign code could write to, and of this one run alone.

    What `lorot` would not have left there is logged and left out: records of other runs, links and what they lead to.

    Args:
        roots: where artifacts may lie, see `service.artifact_places`.

    Raises:
        TrackingError: the job is still running, or the server does not take the records.
        TakenError: the job is still running.
    """
    sent, ended = 0, ""
    if folder.is_symlink() or not (paths := sorted(folder.glob("spool*.jsonl"))):
        return Synced(folder)
    _refuse_if_running(folder)
    watched = False
    try:
        watched = ownership.refuse_if_owned(folder)
    except StorageError as error:
        _log.warning("%s", error)
    for path in paths:
        try:
            spool = Spool(path, most_bytes=_MOST_BYTES)
        except StorageError as error:
            _log.warning("%s; its records are left out", error)
            continue
        try:
            if spool.header().get("run_id") != run_id:
                _log.warning("%s: is not of run %s; its records are left out", path, run_id)
                continue
            if mark(spool, "FAILED", GONE, watched=watched):
                ended = run_id
            sent += _send(spool, folder, uri, partial(StrictDelivery, roots=roots))
        finally:
            spool.close()
    return Synced(folder, sent, ended)


def _refuse_if_running(folder: Path) -> None:
    if holder.is_launched(folder):
        raise TrackingError(f"{folder}: its job is still running and sends its records itself; wait for its end")


def sync_all(folder: Path, uri: str | None = None) -> list[Synced]:
    """As `sync`, for a run's folder or a folder of such; what is wrong with one of many is told, not raised.

    Raises:
        TrackingError: as `sync` for a single run; or no run lies there.
    """
    if any(folder.glob("spool*.jsonl")):
        return [sync(folder, uri)]
    found = []
    for run in sorted({path.parent for path in folder.glob("*/spool*.jsonl")}):
        try:
            found.append(sync(run, uri))
        except LorotError as error:
            found.append(Synced(run, problem=str(error)))
    if not found:
        raise TrackingError(f"{folder}: no {SPOOL}; name the folder of a run, as in runs/train, or the folder of them")
    return found


def run(folder: Path, uri: str | None, say: Callable[[str], object]) -> bool:
    """`lorot sync`: do it and tell; False if records of some run still wait."""
    found = sync_all(folder, uri)
    for one in found:
        before = f"{one.folder}: " if len(found) > 1 else ""
        if one.problem:
            say(f"{before}{one.problem.removeprefix(f'{one.folder}: ')}")
            continue
        after = f"; run {one.ended} is marked FAILED ({GONE}), unless it goes on elsewhere" if one.ended else ""
        say(f"{before}{one.sent} records sent{after}")
    return not any(one.problem for one in found)


def settle(folder: Path, status: str, reason: str, timeout_s: float = 5.0) -> None:
    """End the record of a job whose workers were killed: by its launcher, which outlives them. Never raises.

    Does nothing where the workers have said it themselves, or others go on with the run.

    Args:
        status: FAILED or KILLED.
        timeout_s: how long to try to tell the server; then it waits in the spool for `lorot sync` or a resume.
    """
    path = folder / SPOOL
    if not path.exists():
        return
    try:
        spool = Spool(path, patience_s=1.0)
    except LorotError as error:
        _log.warning("the run's end is not recorded: %s", error)
        return
    ended = True
    try:
        if mark(spool, status, reason):
            header = spool.header()
            sender = Sender(spool, _delivery(header, folder, None), take)
            sender.start()
            sender.drain(timeout_s)
            ended = sender.stop()
    except Exception:
        _log.exception("%s: the run's end is not recorded", folder)
    finally:
        if ended:
            spool.close()


def mark(spool: Spool, status: str, reason: str, *, certain: bool = False, watched: bool = False) -> bool:
    """Write the end of a run whose holder is gone, at the time of its last record; whether that was needed.

    Args:
        certain: the holder is known to be gone, whatever can be seen of it from here.
        watched: the folder was found to be nobody's (`ownership`), which tells of a holder that cannot be seen.
    """
    last_status: Record | None = None
    time_ms = 0
    for record in spool.records():
        time_ms = record.get("time_ms", time_ms)
        if record.get("op") == "status":
            last_status = record
    if last_status is None or last_status.get("status") != "RUNNING":
        return False
    known = Holder.read(last_status.get("holder"))
    if known is not None and not certain:
        alive = known.is_alive()
        # In another container of this machine: the spool's lock, which the caller has, is the same for both.
        if alive or (alive is None and not watched and not known.shares_kernel()):
            return False
    told: Record = {name: last_status[name] for name in ("resumed", "holder") if name in last_status}
    spool.append({"op": "status", "time_ms": time_ms, "status": status, "lost": reason, **told})
    return True


def refuse_if_waiting(folder: Path) -> None:
    """Raise ConfigError if records of an earlier run wait in a folder whose files are about to be replaced.

    A record of a file is the file's name: what it names is read when it is sent.

    Raises:
        TakenError: a process that is still running records there.
    """
    for path in sorted(folder.glob("spool*.jsonl")):
        spool = Spool(path)
        try:
            waiting = spool.waiting()
            run_id = str(spool.header().get("run_id", "unknown"))
        finally:
            spool.close()
        if waiting:
            raise ConfigError(
                f"{folder}: {waiting} records of run {run_id} wait there for the tracking server, with files that "
                f"would be replaced; `lorot sync {folder}` sends them, or choose another output folder"
            )


def send_aside(folder: Path) -> None:
    """Send, in the background, what earlier runs in this folder could not: once; what fails waits for `lorot sync`."""

    def work() -> None:
        for path in sorted(folder.glob("spool-*.jsonl")):
            try:
                spool = Spool(path)
            except LorotError:
                continue
            try:
                _send(spool, folder, None)
            except Exception as error:
                _log.warning("%s: %s; `lorot sync %s` tries again", path, error, folder)
            finally:
                spool.close()

    if any(folder.glob("spool-*.jsonl")):
        threading.Thread(target=work, name="lorot-earlier-runs", daemon=True).start()


def _send(spool: Spool, folder: Path, uri: str | None, kind: Callable[[str, str, Path], Delivery] = Delivery) -> int:
    header = spool.header()
    waiting = spool.waiting()
    if waiting:
        to = _address(header, uri)
        store.ensure_ready(to)
        with store.explained(to):
            deliver = _delivery(header, folder, uri, kind)
            while not deliver_next(spool, deliver, take):
                pass
    return waiting


def _address(header: Record, uri: str | None) -> str:
    return uri or str(header.get("uri", store.default_uri()))


def _delivery(
    header: Record, folder: Path, uri: str | None, kind: Callable[[str, str, Path], Delivery] = Delivery
) -> Callable[[list[Record]], Any]:
    return kind(_address(header, uri), str(header.get("run_id")), folder)
