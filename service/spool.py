"""Records that wait on disk until somebody has taken them: a file of JSON lines, and a thread that delivers them.

The writer appends and goes on. The thread sends what is there in the file's order, asks again after a growing pause
when delivery fails, and writes down how far it has come, so that another process can go on from there. Knows no MLflow.
"""

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service import plain_files
from service.errors import StorageError, TakenError

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
# Of lines that a full disk does not take. Some days of a job's records; beyond them memory is worth more.
_WAITING_BYTES = 64 << 20
# The longest pause that a receiver may ask for.
_LONGEST_REQUEST_S = 300.0
_OFFSET_BYTES = 32

Record = dict[str, Any]


class RefusedError(Exception):
    """The receiver will never take this record: sending it again is pointless."""


class BusyError(Exception):
    """The receiver wants to be left alone for `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Spool:
    """The file. One process holds it at a time (a lock that ends with the process); its threads may share it.

    The first line is the header. `path` with suffix `.sent` holds the number of bytes that have been delivered.
    On a full disk `append` keeps its lines in memory until they can be written, 64 MiB of them at most; it never raises
    nor loses the order.

    Raises:
        TakenError: another process holds the file, and did not give it up within `patience_s`.
        StorageError: the folder cannot be written.
    """

    def __init__(
        self, path: Path, header: Record | None = None, patience_s: float = 0.0, most_bytes: int | None = None
    ) -> None:
        """Open the file; with a `header`, begin it if it does not exist or is empty.

        Args:
            most_bytes: a larger file is refused.
        """
        self.path = path
        self._sent_path = path.with_suffix(".sent")
        self._lock = threading.Lock()
        self._unwritten = bytearray()
        self._complained = False
        self._dropped = 0
        try:
            self._file = plain_files.regular(path, os.O_RDWR | os.O_APPEND | (os.O_CREAT if header is not None else 0))
        except OSError as error:
            raise StorageError(f"{path}: cannot write the records of this run ({error.strerror})") from None
        if most_bytes is not None and os.fstat(self._file).st_size > most_bytes:
            os.close(self._file)
            raise StorageError(f"{path}: has more than {most_bytes} bytes")
        self._hold(patience_s)
        self._mend_tail()
        if header is not None and os.fstat(self._file).st_size == 0:
            self._begin(header)
        self._sent = max(self._read_sent(), os.pread(self._file, _CHUNK_BYTES, 0).find(b"\n") + 1)

    def append(self, record: Record) -> None:
        """Add one record. Returns after the write call: no network and no fsync (a power cut costs some seconds)."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if len(self._unwritten) + len(line) > _WAITING_BYTES:
                if not self._dropped:
                    _log.error("%s: too many records wait in memory; from here on they are lost", self.path)
                self._dropped += 1
                return
            self._unwritten += line
            self._flush()

    def read(self) -> list[tuple[Record, int]]:
        """The next undelivered records, oldest first, each with the offset to acknowledge."""
        with self._lock:
            self._flush()
            start, end = self._sent, os.fstat(self._file).st_size
        data = bytearray()
        while start + len(data) < end and b"\n" not in data:
            data += os.pread(self._file, _CHUNK_BYTES, start + len(data))
        records, offset = [], start
        for line in bytes(data[: data.rfind(b"\n") + 1]).split(b"\n")[:-1]:
            offset += len(line) + 1
            record = _parse(line)
            if record is None:
                _log.warning("%s: the line before byte %d is damaged and is left out", self.path, offset)
            else:
                records.append((record, offset))
        return records

    def header(self) -> Record:
        """The first line; empty if it is damaged."""
        return _parse(os.pread(self._file, _CHUNK_BYTES, 0).split(b"\n", 1)[0]) or {}

    def records(self) -> Iterator[Record]:
        """Every record of the file, delivered or not, without the header; one is in memory at a time."""
        with os.fdopen(plain_files.regular(self.path, os.O_RDONLY), "rb") as file:
            file.readline()
            for line in file:
                if line.endswith(b"\n") and (record := _parse(line[:-1])) is not None:
                    yield record

    @property
    def sent(self) -> int:
        """Up to which byte all has been delivered."""
        return self._sent

    def acknowledge(self, offset: int) -> None:
        """All before `offset` has been delivered. Kept in a file of its own, replaced whole."""
        self._sent = offset
        beside = self._sent_path.with_suffix(".sent-new")
        try:
            with os.fdopen(plain_files.regular(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
                file.write(f"{offset}\n")
            beside.replace(self._sent_path)
        except OSError as error:
            _log.warning("%s: cannot note what was sent (%s); it may be sent again", self._sent_path, error.strerror)

    def waiting(self) -> int:
        """Number of records that have not been delivered."""
        with self._lock:
            self._flush()
            count, position = self._unwritten.count(b"\n"), self._sent
        # Not under the lock: a week's records take seconds to read, and the job is not to wait for that.
        while part := os.pread(self._file, _CHUNK_BYTES, position):
            count += part.count(b"\n")
            position += len(part)
        return count

    def empty(self) -> bool:
        """Whether all has been delivered."""
        with self._lock:
            return not self._unwritten and os.fstat(self._file).st_size == self._sent

    def move(self, path: Path) -> None:
        """Rename the file, and its `.sent` with it."""
        if self._sent_path.exists():
            self._sent_path.replace(path.with_suffix(".sent"))
        self.path.replace(path)
        self.path, self._sent_path = path, path.with_suffix(".sent")

    def discard(self) -> None:
        """Delete the file and its `.sent`, in this order: without that, all would count as not sent."""
        self.path.unlink(missing_ok=True)
        self._sent_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the file up; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _hold(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                os.close(self._file)
                raise TakenError(
                    f"{self.path} is held by another job that is still running; wait for it, or give this one another "
                    "name"
                ) from None
            except OSError:
                _log.info("%s: this file system has no locks", self.path)
                return

    def _begin(self, header: Record) -> None:
        line = json.dumps(header, separators=(",", ":")).encode() + b"\n"
        try:
            # Of an earlier file, that was deleted or that a power cut emptied: what was sent of it was not of this one.
            self._sent_path.unlink(missing_ok=True)
            complete = os.write(self._file, line) == len(line)
        except OSError:
            complete = False
        if not complete:
            os.ftruncate(self._file, 0)
            raise StorageError(f"{self.path}: cannot write the records of this run; is the disk full?")

    def _flush(self) -> None:
        try:
            while self._unwritten:
                del self._unwritten[: os.write(self._file, self._unwritten)]
            self._complained = False
        except OSError as error:
            if not self._complained:
                _log.warning("%s: cannot write (%s); records wait in memory", self.path, error.strerror)
            self._complained = True

    def _mend_tail(self) -> None:
        """Cut a last line that a lost machine left half written: nobody has been told of it."""
        size = os.fstat(self._file).st_size
        start = size
        while start > 0:
            start = max(0, start - _CHUNK_BYTES)
            found = os.pread(self._file, _CHUNK_BYTES, start).rfind(b"\n")
            if found >= 0:
                start += found + 1
                break
        if start < size:
            os.ftruncate(self._file, start)

    def _read_sent(self) -> int:
        try:
            with os.fdopen(plain_files.regular(self._sent_path, os.O_RDONLY), "rb") as file:
                sent = int(file.read(_OFFSET_BYTES))
        except (OSError, ValueError):
            return 0
        return sent if 0 <= sent <= os.fstat(self._file).st_size else 0


class Sender:
    """The thread that empties a spool.

    Args:
        deliver: sends some consecutive records at once, or raises: RefusedError for records that nobody will ever
            take, anything else for a receiver that is away.
        take: how many of the given records `deliver` may get together (at least 1).
        longest_pause_s: bound of the pause after failures, which starts at half a second and doubles. A receiver that
            asks for a longer one (BusyError) gets it, up to five minutes.
    """

    def __init__(
        self,
        spool: Spool,
        deliver: Callable[[list[Record]], None],
        take: Callable[[list[Record]], int] = lambda records: 1,
        longest_pause_s: float = 30.0,
    ) -> None:
        self._spool = spool
        self._deliver = deliver
        self._take = take
        self._longest_pause_s = longest_pause_s
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._hurried = False
        self._away_since: float | None = None
        self.last_error = ""
        self._thread = threading.Thread(target=self._work, name="lorot-sender", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def wake(self) -> None:
        """Something was appended. Never waits."""
        if self._away_since is None:
            self._changed.set()

    def drain(self, timeout_s: float, away_s: float = 5.0) -> bool:
        """Wait until all is delivered; True if it is. The thread goes on.

        Args:
            timeout_s: the longest wait.
            away_s: the longest wait for a receiver that takes nothing and fails, or has failed all the time before.
        """
        self._hurried = True
        self._changed.set()
        began = time.monotonic()
        while not self._spool.empty() and self._thread.is_alive():
            now, away_since = time.monotonic(), self._away_since
            if now - began >= timeout_s or (away_since is not None and now - max(away_since, began) >= away_s):
                break
            time.sleep(0.02)
        self._hurried = False
        return self._spool.empty()

    def stop(self, timeout_s: float = 3.0) -> bool:
        """End the thread; what is under way is abandoned after `timeout_s`. True if the thread has ended."""
        self._stopping.set()
        self._changed.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        pause_s = shortest_s = min(0.5, self._longest_pause_s)
        while not self._stopping.is_set():
            self._changed.clear()
            sent = self._spool.sent
            try:
                all_sent = deliver_next(self._spool, self._deliver, self._take)
            except Exception as error:
                if self._away_since is None:
                    _log.warning("records wait in %s: %s", self._spool.path, error)
                if self._away_since is None or self._spool.sent != sent:
                    self._away_since, pause_s = time.monotonic(), shortest_s
                self.last_error = str(error)
                if isinstance(error, BusyError):
                    self._stopping.wait(min(error.retry_after_s, _LONGEST_REQUEST_S))
                # While the server is away, new records do not wake the thread: the pause is the whole point of it.
                self._changed.wait(min(pause_s, 1.0) if self._hurried else pause_s)
                pause_s = min(2 * pause_s, self._longest_pause_s)
                continue
            if self._away_since is not None:
                _log.warning("the tracking server is back; the records in %s are being sent", self._spool.path)
            self._away_since, pause_s = None, shortest_s
            if all_sent:
                self._changed.wait(5.0)


def deliver_next(
    spool: Spool, deliver: Callable[[list[Record]], None], take: Callable[[list[Record]], int] = lambda records: 1
) -> bool:
    """Deliver what `read` gives, in order, and acknowledge each part at once; True if there was nothing.

    A refused part is tried record by record, and what is refused then is logged and passed over: it stays in the file.
    Raises what `deliver` raises otherwise.
    """
    waiting = spool.read()
    records = [record for record, _ in waiting]
    start = 0
    while start < len(waiting):
        count = min(max(1, take(records[start:])), len(waiting) - start)
        try:
            deliver(records[start : start + count])
        except RefusedError as error:
            if count > 1:
                take, count = (lambda records: 1), 0
            else:
                _log.warning("%s: a record was refused and is left out: %s", spool.path, error)
        start += count
        if count:
            spool.acknowledge(waiting[start - 1][1])
    return not waiting


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
