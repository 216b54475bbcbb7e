"""What MLflow and the backends are asked for a page: in threads of its own, for some seconds at most, not too often.

Where one of them hangs, only what needs it waits: all other routes have the server's threads for themselves.
"""

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from service import store
from service.errors import TrackingError
from service.jobs import orders, shown
from service.jobs.desk import Desk
from service.jobs.job import Job
from service.run_folder import RunFolder

# Threads for questions, and as many for changes, which are written to MLflow.
_THREADS = 8
# How long a page waits for an answer, and one that is about nothing else.
SHORT_S, LONG_S = 3.0, 10.0
# How long an answer or a failure is told again, and MLflow is left alone after it has hung.
_FRESH_S = 5.0
_MOST_KEPT = 512
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Kept(Generic[_T]):
    """An answer or what is wrong, and until when it is told again."""

    value: _T | None
    problem: str
    until: float


class Questions:
    """Questions to MLflow, answers and failures kept for some seconds; and the threads for all that may hang."""

    def __init__(self) -> None:
        self.reading = CapacityLimiter(_THREADS)
        self.changing = CapacityLimiter(_THREADS)
        self._kept: dict[Any, _Kept[Any]] = {}
        self._rests_until = 0.0
        self._lock = threading.Lock()

    def ask(self, key: Any, question: Callable[[], _T], timeout_s: float = SHORT_S) -> _T:
        """The answer to `key`'s question; raises TrackingError, at once for a while after MLflow has hung."""
        now = time.monotonic()
        with self._lock:
            kept, is_resting = self._kept.get(key), now < self._rests_until
        if kept is not None and now < kept.until:
            if kept.problem:
                raise TrackingError(kept.problem)
            known: Any = kept.value
            return known
        if is_resting:
            raise TrackingError("MLflow has not answered just now; it is asked again in some seconds")
        try:
            value = within(timeout_s, question)
        except _HangsError as error:
            with self._lock:
                self._rests_until = time.monotonic() + _FRESH_S
            self._keep(key, None, str(error))
            raise
        except TrackingError as error:
            self._keep(key, None, str(error))
            raise
        self._keep(key, value, "")
        return value

    def history(self, desk: Desk, job_id: str) -> list[dict[str, float]]:
        """`desk.metrics`; raises UnknownJobError, TrackingError."""
        job = desk.get(job_id)
        own = RunFolder(orders.folder_of(desk.settings, job.id) / orders.RUN).metrics
        with contextlib.suppress(OSError):
            if own.lstat().st_size:
                # Read from there, and MLflow is not asked unless it holds nothing of use.
                return within(LONG_S, lambda: desk.metrics(job.id))
        return self.ask(("history", job.id), lambda: desk.metrics(job.id))

    def configuration(self, desk: Desk, job_id: str) -> dict[str, Any]:
        """`desk.configuration`; raises UnknownJobError, TrackingError."""
        job = desk.get(job_id)
        return self.ask(("configuration", job.id), lambda: desk.configuration(job.id))

    def compare(self, desk: Desk, job_ids: Sequence[str]) -> dict[str, Any]:
        """`desk.compare`, also where MLflow does not say what jobs were resolved to; raises as `history`."""
        jobs = [desk.get(job_id) for job_id in job_ids]
        return shown.compare(jobs, [self.history(desk, job.id) for job in jobs], configurations(desk, jobs))

    def _keep(self, key: Any, value: Any, problem: str) -> None:
        now = time.monotonic()
        with self._lock:
            if len(self._kept) >= _MOST_KEPT:
                self._kept = {name: one for name, one in self._kept.items() if one.until > now}
            if len(self._kept) < _MOST_KEPT:
                self._kept[key] = _Kept(value, problem, now + _FRESH_S)


class _HangsError(TrackingError):
    """No answer, and no refusal either."""


def within(timeout_s: float, question: Callable[[], _T]) -> _T:
    """The answer, or a TrackingError when it takes too long."""
    try:
        return store.within(timeout_s, question)
    except TimeoutError:
        raise _HangsError(f"MLflow has not answered within {timeout_s:g} s; try again in some seconds") from None


def configurations(desk: Desk, jobs: Sequence[Job]) -> Mapping[str, Mapping[str, Any]] | None:
    """`desk.configurations`; None where MLflow does not say. Not kept: they are large."""
    with contextlib.suppress(TrackingError):
        return within(LONG_S, lambda: desk.configurations(jobs))
    return None


async def reading(request: Request, question: Callable[[], _T]) -> _T:
    """Run what may ask MLflow or a backend, in a thread of those that are there for it."""
    return await to_thread.run_sync(question, limiter=_of(request).reading)


async def changing(request: Request, change: Callable[[], _T]) -> _T:
    """Run what writes to MLflow, in a thread of those that are there for it."""
    return await to_thread.run_sync(change, limiter=_of(request).changing)


async def pieces(request: Request, source: Iterator[bytes]) -> AsyncIterator[bytes]:
    """What a backend yields, each piece got in one of those threads; between two of them none is held."""
    while (piece := await reading(request, lambda: next(source, None))) is not None:
        yield piece


def _of(request: Request) -> Questions:
    questions: Questions = request.app.state.questions
    return questions


__all__ = ["LONG_S", "SHORT_S", "Questions", "changing", "configurations", "pieces", "reading", "within"]
