"""Following the log of a job as server-sent events, from wherever the last connection ended."""

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from service.api import sse
from service.api.growing_log import GrowingLog, cut
from service.errors import ConfigError
from service.jobs import orders, traits
from service.jobs.desk import Desk
from service.jobs.job import Attempt, Job
from service.jobs.settings import ServiceSettings

_T = TypeVar("_T")
# Between two looks at a job that has not begun.
_WAIT_S = 0.5
_KEEPALIVE_EVERY = int(sse.KEEPALIVE_S / _WAIT_S)
_READERS = 4
# Of a log that lies in no file here, its last bytes are kept while it is followed: so many of the first eight such
# logs, and less of those beyond, so that even all streams there may be take no more than some 2 GB.
SPOOL_BYTES = 64 << 20
_LARGE_SPOOLS, _SMALLER = 8, 16
# Engines count what they have kept, and a long line may be several of that: so many more are asked for.
_SLACK_LINES = 32
# How long one that begins with its last lines is kept after its last follower, who may come back after a broken
# connection: where it begins not every backend could find again. As long as our client tries.
LINGER_S = 60.0
_MOST_LINGERING = 16
_ID = re.compile(r"(?:([0-9]{1,9}):)?([0-9]{1,19})(?:@([0-9a-zA-Z.~-]{1,50}))?")
_LOST = b"[it is not known any more how far this log was read: it is told anew, from where it was asked for]"
_Key = tuple[str, int, int, int | str | None]


class Followers:
    """All who follow a log. Every log is looked at once, however many follow it; readers share a few threads.

    Events: `attempt` ({"attempt", "node"}) before the lines of each start of the job; lines, without a name, each event
    some whole ones, and a line of our own where some were left out; `problem` ({"message"}) where the log cannot be
    read on; `end` ({"state", "reason", ...}) at last.
    """

    def __init__(self, desk: Desk, spool_bytes: int = SPOOL_BYTES) -> None:
        self._desk = desk
        self.spool_bytes = spool_bytes
        self._pool = ThreadPoolExecutor(_READERS, "lorot-follow")
        # By job, attempt, node, and how many last lines or at which place it begins; None: it begins with the first.
        self._logs: dict[_Key, GrowingLog] = {}
        # Those that nobody follows just now, the longest left first.
        self._lingering: dict[_Key, asyncio.TimerHandle] = {}
        self._closed = False

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        for key in list(self._lingering):
            self._let_go(key)
        for log in self._logs.values():
            log.wake()

    def free(self) -> None:
        """Let the threads go, once all streams have ended."""
        self.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def follow(
        self, job_id: str, *, attempt: int | None = None, node: int = 0, tail: int | None = None, last_id: str = ""
    ) -> AsyncIterator[bytes]:
        """Events of one attempt, or of the newest and all that come after it.

        Args:
            attempt: its ids are OFFSET. None: the next ones follow, until the job has ended; ids are ATTEMPT:OFFSET.
            tail: begin with the last so many lines of what is there. Where no file has the log, it is read from there
                on only; ids end with @PLACE then, and count from that.
            last_id: id of the last event that had arrived: bytes of the log that were told.
        """
        number, offset, place = self.place(last_id, attempt)
        pinned, waited, announced = attempt is not None, 0, 0
        yield sse.KEEPALIVE
        while not self._closed:
            job = await self._run(lambda: self._desk.get(job_id))
            # Of a job that has not begun, nothing is left out.
            number = number or max(1, job.newest)
            if number > job.newest:
                if job.has_ended:
                    yield _end(job, None)
                    return
                await asyncio.sleep(_WAIT_S)
                waited += 1
                if waited % _KEEPALIVE_EVERY == 0:
                    yield sse.KEEPALIVE
                continue
            identifier = "" if pinned else f"{number}:"
            if number != announced:
                yield sse.json_event({"attempt": number, "node": node}, name="attempt")
                announced = number
            # An offset without a place counts from the first byte.
            begins = place or (tail if offset is None else None)
            async with self._opened(job, number, node, begins) as log:
                # Nothing is counted from a place in a file: it was made when there was none.
                is_lost = bool(place) and not log.is_tail
                if not is_lost:
                    start = (log.find(place) or 0) if place else 0
                    async for piece in self._pieces(log, identifier, None if offset is None else start + offset, tail):
                        yield piece
                    is_lost = log.is_lost
                problem = log.problem
            if self._closed:
                return
            if is_lost:
                # Without an id: what was told last is still all that is known.
                yield sse.event(_LOST.decode())
                place, offset = "", None
                continue
            if problem:
                yield sse.json_event({"message": problem}, name="problem")
                return
            job = await self._run(lambda: self._desk.get(job_id))
            if pinned or (job.has_ended and job.newest == number):
                yield _end(job, _attempt(job, number))
                return
            number, offset, tail, place = number + 1, None, None, ""

    async def _pieces(
        self, log: GrowingLog, identifier: str, offset: int | None, tail: int | None
    ) -> AsyncIterator[bytes]:
        while offset is None and tail is not None and not log.settled and not self._closed:
            if not await log.changed(log.more, sse.KEEPALIVE_S):
                yield sse.KEEPALIVE
        if offset is None:
            offset = 0 if tail is None else await log.start_of_last(tail) if tail else log.size
        while not self._closed:
            # Taken before looking: what comes while this reads is not to be waited for afterwards.
            more, done = log.more, log.done
            if offset < log.start:
                # Ahead of what goes next, or this one would be too late again at once.
                start = log.middle
                yield _lines(_gap(start - offset), f"{identifier}{log.placed(start)}")
                offset = start
            if offset < log.size:
                data = await log.read(offset)
                if taken := cut(data, done):
                    offset += taken
                    yield _lines(data[:taken], f"{identifier}{log.placed(offset)}")
                    continue
            if done:
                return
            if not await log.changed(more, sse.KEEPALIVE_S):
                yield sse.KEEPALIVE

    @contextlib.asynccontextmanager
    async def _opened(self, job: Job, number: int, node: int, begins: int | str | None) -> AsyncIterator[GrowingLog]:
        """The log from its last lines, a place or its first byte on; all of it where a file has it."""
        path = log_file(self._desk.settings, job.id, number, node)
        has_file = traits.of(job.spec.backend).writes_logs_here or (_has_ended(job, number) and path.exists())
        key = self._with(job.id, number, node, begins) if isinstance(begins, str) else None
        if key is None:
            whole = self._logs.get((job.id, number, node, None))
            has_all = has_file or (isinstance(begins, int) and whole is not None and whole.settled)
            key = (job.id, number, node, None if has_all else begins)
        log = self._logs.get(key)
        if log is not None and _has_failed(log):
            self._let_go(key)
            log = None
        if log is None:
            log = self._logs[key] = GrowingLog(self._pool)
            if has_file:
                log.watch(path, lambda: _has_ended(self._desk.get(job.id), number))
            else:
                self._pump(log, key)
        if timer := self._lingering.pop(key, None):
            timer.cancel()
        log.users += 1
        try:
            yield log
        finally:
            log.users -= 1
            if not log.users:
                self._leave(key, log)

    def _pump(self, log: GrowingLog, key: _Key) -> None:
        job_id, number, node, begins = key
        kept = sum(log.spool_bytes >= self.spool_bytes for log in self._logs.values())
        size = self.spool_bytes if kept < _LARGE_SPOOLS else self.spool_bytes // _SMALLER
        since = begins if isinstance(begins, str) else ""
        tail = begins + _SLACK_LINES if isinstance(begins, int) else None
        # Until it comes by a place that outlives it, a tail has a name that is known as long as it is open.
        place = since or ("" if tail is None else secrets.token_hex(4))
        log.pump(
            lambda go_on: self._desk.logs(job_id, attempt=number, node=node, tail=tail, follow=go_on, since=since),
            size,
            place=place,
        )

    def _with(self, job_id: str, number: int, node: int, place: str) -> _Key | None:
        """Which log comes by this place, if it is still open and can be gone on with."""
        logs = ((key, log) for key, log in self._logs.items() if key[:3] == (job_id, number, node))
        return next((key for key, log in logs if log.find(place) is not None and not _has_failed(log)), None)

    def _leave(self, key: _Key, log: GrowingLog) -> None:
        if not log.is_tail or log.problem or self._closed:
            self._let_go(key)
            return
        self._lingering[key] = asyncio.get_running_loop().call_later(LINGER_S, self._let_go, key)
        if len(self._lingering) > _MOST_LINGERING:
            self._let_go(next(iter(self._lingering)))

    def _let_go(self, key: _Key) -> None:
        if timer := self._lingering.pop(key, None):
            timer.cancel()
        if log := self._logs.pop(key, None):
            log.close()

    async def _run(self, ask: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, ask)

    @staticmethod
    def place(last_id: str, attempt: int | None) -> tuple[int | None, int | None, str]:
        """(attempt, offset, name) to go on from; raises ConfigError for what is no event's id."""
        if not last_id:
            return attempt, None, ""
        found = _ID.fullmatch(last_id)
        if found is None:
            raise ConfigError(f"Last-Event-ID: {last_id[:80]!r} is no event of a log, as 1:5000 or 5000")
        number, offset, name = found.groups()
        if attempt is None and number:
            attempt = int(number)
        return attempt, int(offset), name or ""


def log_file(settings: ServiceSettings, job_id: str, attempt: int, node: int) -> Path:
    """Where what a node has written lies, if its backend writes it there."""
    return orders.attempt_folder(settings, job_id, attempt) / f"log-node{node}.txt"


def _has_failed(log: GrowingLog) -> bool:
    """While nobody followed: whoever comes next has another try."""
    return bool(log.problem) and not log.users


def _has_ended(job: Job, number: int) -> bool:
    attempt = _attempt(job, number)
    return job.has_ended or job.newest > number or attempt is None or attempt.ended_s > 0


def _attempt(job: Job, number: int) -> Attempt | None:
    return next((one for one in job.attempts if one.number == number), None)


def _lines(data: bytes, identifier: str) -> bytes:
    text = data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    return sse.event(text.removesuffix("\n"), identifier=identifier)


def _gap(num_bytes: int) -> bytes:
    return (
        f"[{num_bytes:,} bytes were left out here: the log is longer than what is kept of it to be followed]".encode()
    )


def _end(job: Job, attempt: Attempt | None) -> bytes:
    content: dict[str, Any] = {"state": job.state, "reason": job.reason, "attempt": None, "exit_code": None}
    if attempt is not None:
        content |= {"attempt": attempt.number, "exit_code": attempt.exit_code}
    return sse.json_event(content, name="end")
