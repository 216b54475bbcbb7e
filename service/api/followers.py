"""Following the log of a job as server-sent events, from wherever the last connection ended."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from service.api import sse
from service.api.growing_log import GrowingLog, cut
from service.errors import ConfigError
from service.jobs import orders
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
        self._logs: dict[tuple[str, int, int], GrowingLog] = {}
        self._closed = False

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        for log in self._logs.values():
            log.wake()

    def free(self) -> None:
        """Let the threads go, once all streams have ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def follow(
        self, job_id: str, *, attempt: int | None = None, node: int = 0, tail: int | None = None, last_id: str = ""
    ) -> AsyncIterator[bytes]:
        """Events of one attempt, or of the newest and all that come after it.

        Args:
            attempt: its ids are OFFSET. None: the next ones follow, until the job has ended; ids are ATTEMPT:OFFSET.
            tail: begin with the last so many lines of what is there.
            last_id: id of the last event that had arrived: bytes of the log that were told.
        """
        number, offset = self.place(last_id, attempt)
        pinned, waited = attempt is not None, 0
        yield sse.KEEPALIVE
        while not self._closed:
            job = await self._run(lambda: self._desk.get(job_id))
            # Of a job that has not begun, nothing is left out.
            number = number or max(1, _newest(job))
            if number > _newest(job):
                if job.has_ended:
                    yield _end(job, None)
                    return
                await asyncio.sleep(_WAIT_S)
                waited += 1
                if waited % _KEEPALIVE_EVERY == 0:
                    yield sse.KEEPALIVE
                continue
            identifier = "" if pinned else f"{number}:"
            yield sse.json_event({"attempt": number, "node": node}, name="attempt")
            async with self._opened(job, number, node) as log:
                async for piece in self._pieces(log, identifier, offset, tail):
                    yield piece
                problem = log.problem
            if self._closed:
                return
            if problem:
                yield sse.json_event({"message": problem}, name="problem")
                return
            job = await self._run(lambda: self._desk.get(job_id))
            if pinned or (job.has_ended and _newest(job) == number):
                yield _end(job, _attempt(job, number))
                return
            number, offset, tail = number + 1, None, None

    async def _pieces(
        self, log: GrowingLog, identifier: str, offset: int | None, tail: int | None
    ) -> AsyncIterator[bytes]:
        while offset is None and tail is not None and not log.settled and not self._closed:
            await log.changed(log.more, sse.KEEPALIVE_S)
        if offset is None:
            offset = 0 if tail is None else await log.start_of_last(tail) if tail else log.size
        while not self._closed:
            # Taken before looking: what comes while this reads is not to be waited for afterwards.
            more, done = log.more, log.done
            if offset < log.start:
                # Ahead of what goes next, or this one would be too late again at once.
                start = log.middle
                yield _lines(_gap(start - offset), f"{identifier}{start}")
                offset = start
            if offset < log.size:
                data = await log.read(offset)
                if taken := cut(data, done):
                    offset += taken
                    yield _lines(data[:taken], f"{identifier}{offset}")
                    continue
            if done:
                return
            if not await log.changed(more, sse.KEEPALIVE_S):
                yield sse.KEEPALIVE

    @contextlib.asynccontextmanager
    async def _opened(self, job: Job, number: int, node: int) -> AsyncIterator[GrowingLog]:
        key = (job.id, number, node)
        log = self._logs.get(key)
        if log is None:
            log = self._logs[key] = GrowingLog(self._pool)
            self._begin(log, job, number, node)
        log.users += 1
        try:
            yield log
        finally:
            log.users -= 1
            if not log.users:
                self._logs.pop(key, None)
                log.close()

    def _begin(self, log: GrowingLog, job: Job, number: int, node: int) -> None:
        path = log_file(self._desk.settings, job.id, number, node)
        if job.spec.backend == "local" or (_has_ended(job, number) and path.exists()):
            log.watch(path, lambda: _has_ended(self._desk.get(job.id), number))
        else:
            kept = sum(log.spool_bytes >= self.spool_bytes for log in self._logs.values())
            size = self.spool_bytes if kept < _LARGE_SPOOLS else self.spool_bytes // _SMALLER
            log.pump(lambda more: self._desk.logs(job.id, attempt=number, node=node, follow=more), size)

    async def _run(self, ask: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, ask)

    @staticmethod
    def place(last_id: str, attempt: int | None) -> tuple[int | None, int | None]:
        """(attempt, offset) to go on from; raises ConfigError for what is no event's id."""
        if not last_id:
            return attempt, None
        number, colon, offset = last_id.rpartition(":")
        if not offset.isdecimal() or (colon and not number.isdecimal()) or len(last_id) > 40:
            raise ConfigError(f"Last-Event-ID: {last_id[:80]!r} is no event of a log, as 1:5000 or 5000")
        if attempt is None and colon:
            return int(number), int(offset)
        return attempt, int(offset)


def log_file(settings: ServiceSettings, job_id: str, attempt: int, node: int) -> Path:
    """Where what a node has written lies, if its backend writes it there."""
    return orders.attempt_folder(settings, job_id, attempt) / f"log-node{node}.txt"


def _has_ended(job: Job, number: int) -> bool:
    attempt = _attempt(job, number)
    return job.has_ended or _newest(job) > number or attempt is None or attempt.ended_s > 0


def _newest(job: Job) -> int:
    return job.attempt.number if job.attempt is not None else 0


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
