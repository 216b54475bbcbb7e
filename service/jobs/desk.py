"""What clients can do with jobs: the API, the console and the command line all ask here. Imports no torch."""

import base64
import binascii
import contextlib
import errno
import json
import os
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from service import machine
from service.errors import BackendError, ConfigError, LorotError, StateError, StorageError, UnknownJobError
from service.jobs import backends as places
from service.jobs import checking, history, log_file, orders, queue, runs, shown, traits
from service.jobs.backends import Backend
from service.jobs.job import Job
from service.jobs.queue import Amount, Entry
from service.jobs.record import Record
from service.jobs.runner import LOG
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec, num_bytes

_MOST_OF_A_PAGE = 1000
_SHORTEST_PREFIX = 6
_PAUSE_S = 0.5
_TRIED_BYTES = 1 << 16


@dataclass(frozen=True)
class Page:
    """Some of the jobs, the newest first.

    Attributes:
        next: cursor of the page after this one; None: this is the last.
        total: how many jobs there are on all pages.
        is_partial: jobs that have ended are still being read; there will be more.
    """

    jobs: tuple[Job, ...]
    next: str | None
    total: int
    is_partial: bool


class Desk:
    """Thread-safe."""

    def __init__(
        self,
        settings: ServiceSettings,
        record: Record | None = None,
        backends: Mapping[str, Backend] | None = None,
    ) -> None:
        self.settings = settings
        self.record = record or Record(settings)
        self._backends: dict[str, Backend] = dict(backends or {})
        self._loading = threading.Lock()
        self._capacity: Amount | None = None

    @property
    def capacity(self) -> Amount:
        """What this machine has for jobs."""
        if self._capacity is None:
            gpus, cpus, memory = self.settings.gpus, self.settings.cpus, self.settings.memory
            self._capacity = Amount(
                machine.gpus() if gpus is None else gpus,
                float(machine.cores() if cpus is None else cpus),
                machine.memory_bytes() if memory is None else num_bytes(memory),
            )
        return self._capacity

    def backend(self, name: str) -> Backend:
        """The backend of this name; raises ConfigError if it is not set up."""
        with self._loading:
            if name not in self._backends:
                self._backends[name] = places.load(name, self.settings)
            return self._backends[name]

    def backends(self) -> dict[str, Backend]:
        """Those that are in use, by name."""
        with self._loading:
            return dict(self._backends)

    def check(self, spec: JobSpec, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
        """As `checking.check`, by this service's settings, for this machine."""
        return checking.check(spec, self.settings, self.backend(spec.backend), self.capacity, recorded)

    def submit(self, spec: JobSpec, *, owner: str = "", key: str = "") -> tuple[Job, bool]:
        """A new job, and True; or the one that this owner's key has made before, and False.

        Raises:
            ConfigError: as `check`.
            StateError: the key has made a job of another spec.
            TrackingError: it could not be recorded; ask again, with a key lest there be two.
        """
        return self.record.create(spec, self.check(spec), owner=owner, key=key)

    def configuration(self, job_id: str) -> dict[str, Any]:
        """The resolved configuration that a job starts with; empty for a container, or if nobody knows it any more.

        Raises:
            UnknownJobError: there is no such job.
            TrackingError: the record does not answer.
        """
        job = self.get(job_id)
        if job.spec.kind == "container":
            return {}
        recorded = self.recorded(job)
        return shown.configuration(orders.folder_of(self.settings, job.id)) if recorded is None else recorded

    def recorded(self, job: Job) -> dict[str, Any] | None:
        """What a job was resolved to when it was submitted; None: nothing was recorded, as for a container.

        Raises:
            ConfigError: somebody has changed it.
            TrackingError: the record does not answer.
        """
        return None if job.spec.kind == "container" else self.record.configuration(job.id)

    def configurations(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """As `recorded`, of several jobs by their ids, without those of which nothing is; raises TrackingError."""
        return runs.configurations(self.record.uri, jobs)

    def try_storage(self) -> None:
        """Write a little where jobs leave their results; raises StorageError."""
        results = self.settings.results
        try:
            results.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=results) as file:
                file.write(bytes(_TRIED_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "free some space there" if is_full else "let the service's user write there, or change `results`"
            raise StorageError(f"{results}: cannot be written ({error.strerror}); {hint}") from None

    def page(
        self,
        *,
        state: str | None = None,
        kind: str | None = None,
        backend: str | None = None,
        owner: str | None = None,
        name: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page:
        """Jobs that have all that is given, the newest first.

        Args:
            name: a part of it, in any case.
            limit: jobs of a page.
            cursor: `next` of the page before. Jobs that come meanwhile shift nothing.

        Raises:
            ConfigError: the cursor is none, or the limit out of range.
        """
        if not 1 <= limit <= _MOST_OF_A_PAGE:
            raise ConfigError(f"limit: {limit} is none from 1 to {_MOST_OF_A_PAGE}")
        # Before the look: it is not said of less than all that it is all.
        is_partial = self.record.is_partial
        found = self.record.jobs()
        # One pass for each of what is given: mostly nothing or one thing is.
        if state is not None:
            found = [job for job in found if job.state == state]
        if kind is not None:
            found = [job for job in found if job.spec.kind == kind]
        if backend is not None:
            found = [job for job in found if job.spec.backend == backend]
        if owner is not None:
            found = [job for job in found if job.owner == owner]
        if name:
            wanted = name.lower()
            found = [job for job in found if wanted in job.spec.name.lower()]
        start = 0
        if cursor is not None:
            start = bisect_right(found, _place(cursor), key=lambda job: (-job.submitted_s, _last(job.id)))
        part = found[start : start + limit]
        more = start + limit < len(found)
        return Page(tuple(part), _cursor(part[-1]) if more else None, len(found), is_partial)

    def get(self, job_id: str) -> Job:
        """The job of this id, or of an id that begins so; raises UnknownJobError if that is none or several."""
        with contextlib.suppress(UnknownJobError):
            return self.record.get(job_id)
        if len(job_id) >= _SHORTEST_PREFIX:
            found = self.record.beginning_with(job_id)
            if len(found) == 1:
                return found[0]
            if found:
                raise UnknownJobError(f"{len(found)} jobs have an id that begins with {job_id!r}; give more of it")
        is_short = len(job_id) < _SHORTEST_PREFIX and set(job_id) <= set(_DIGITS)
        advice = f"give {_SHORTEST_PREFIX} digits of its id at least; " if is_short else ""
        raise UnknownJobError(f"there is no job {job_id!r}; {advice}`lorot jobs` lists them")

    def cancel(self, job_id: str) -> Job:
        """Ask a job to stop: at once if it waits, else by a signal that its backend sends.

        Raises:
            StateError: it has ended otherwise.
        """
        job = self.get(job_id)

        def decide(job: Job) -> Mapping[str, Any]:
            if job.state == "queued":
                return {"state": "killed", "cancel": True, "reason": "cancelled", "ended_s": time.time()}
            if job.has_ended:
                if job.cancel and job.state == "killed":
                    return {}
                raise StateError(f"job {job.id} has ended ({job.state}); there is nothing to cancel")
            return {"cancel": True}

        return self.record.update(job.id, decide)

    def retry(self, job_id: str) -> Job:
        """Let a job that failed or was killed begin anew; its run folder is set aside, beside it, when it starts.

        Raises:
            StateError: it finished, or has not ended.
            ConfigError: as `check`: what was allowed then may not be now.
            TrackingError: the record does not answer.
        """
        job = self.get(job_id)
        self._refuse_unless(job, "retry")
        self.check(job.spec, self.recorded(job))
        return self.record.update(job.id, lambda now: self._again(now, "retry", resume=False))

    def resume(self, job_id: str) -> Job:
        """Let a job that failed or was stopped go on from its last checkpoint.

        Raises:
            StateError, ConfigError, TrackingError: as `retry`.
        """
        job = self.get(job_id)
        self._refuse_unless(job, "resume")
        self.check(job.spec, self.recorded(job))
        return self.record.update(job.id, lambda now: self._again(now, "resume", resume=True))

    def logs(
        self,
        job_id: str,
        *,
        attempt: int | None = None,
        node: int = 0,
        tail: int | None = None,
        follow: Callable[[], bool] | None = None,
        since: str = "",
    ) -> Iterator[bytes]:
        """What a node of an attempt has written, in pieces, from its first byte on.

        Args:
            attempt: its number; None: the newest. Followed before the first start, it is waited for.
            tail: the last lines only.
            follow: go on until the attempt has ended or this says no; b"" comes now and then.
            since: from a place on, which is where a `Placed` piece of an earlier reading began; with `follow` alone.

        Raises:
            UnknownJobError: there is no such job or attempt.
        """
        job = self.get(job_id)
        if attempt is not None and not any(one.number == attempt for one in job.attempts):
            known = ", ".join(str(one.number) for one in job.attempts) or "none yet"
            raise UnknownJobError(f"job {job.id} has no attempt {attempt}; there are {known}")
        return self._logs(job, attempt, node, tail, follow, since)

    def metrics(self, job_id: str) -> list[dict[str, float]]:
        """The job's measurements, in order: each with its `step`."""
        job = self.get(job_id)
        return history.metrics(orders.folder_of(self.settings, job.id), self.record.uri, job.id)

    def progress(self, job_id: str) -> dict[str, Any]:
        """How far it is, as far as that is known: step, total_steps, share, images_per_s, data_wait_share, eta_s.

        Of one that waits: `position` in the queue, from 1.
        """
        job = self.get(job_id)
        if job.state == "queued":
            waiting = [entry.id for entry in self.waiting()]
            return {"position": waiting.index(job.id) + 1} if job.id in waiting else {}
        return history.progress(orders.folder_of(self.settings, job.id), is_running=not job.has_ended)

    def files(self, job_id: str) -> dict[str, Path]:
        """What of a job may be shown: pictures, pages, configurations; by name."""
        return shown.files(orders.folder_of(self.settings, self.get(job_id).id))

    def open_file(self, job_id: str, name: str) -> BinaryIO:
        """One of a job's `files`, to read; raises UnknownJobError if there is none of this name."""
        return shown.opened(orders.folder_of(self.settings, self.get(job_id).id), name)

    def compare(self, job_ids: Sequence[str]) -> dict[str, Any]:
        """Jobs side by side, as `shown.compare` tells it; raises UnknownJobError, TrackingError."""
        jobs = [self.get(job_id) for job_id in job_ids]
        return shown.compare(jobs, [self.metrics(job.id) for job in jobs], self.configurations(jobs))

    def waiting(self) -> list[Entry]:
        """Those that wait for their turn on this machine, the next first."""
        jobs = self.record.open_jobs()
        return queue.in_order(self.entry(job) for job in jobs if job.state == "queued" and self.counts(job))

    def queue(self) -> dict[str, Any]:
        """This machine's: {"gpus": {"all", "used"}, "cpus": {...}, "memory": {...}, "waiting": [ids in order],
        "running": [ids]}; memory in bytes, of the jobs that name what they need.
        """
        jobs = self.record.open_jobs()
        running = [job for job in jobs if job.state != "queued"]
        used = queue.total(self.entry(job) for job in running if self.counts(job))
        here = self.capacity
        elsewhere = queue.in_order(self.entry(job) for job in jobs if job.state == "queued" and not self.counts(job))
        return {
            "gpus": {"all": here.gpus, "used": used.gpus},
            "cpus": {"all": here.cpus, "used": used.cpus},
            "memory": {"all": here.memory, "used": used.memory},
            "waiting": [entry.id for entry in [*self.waiting(), *elsewhere]],
            "running": [job.id for job in sorted(running, key=lambda job: job.submitted_s)],
        }

    def counts(self, job: Job) -> bool:
        """Whether a job takes from this machine."""
        try:
            self.backend(job.spec.backend)
        except LorotError:
            # Not set up any more: it would wait at the head of the queue for ever.
            return False
        return traits.of(job.spec.backend).uses_this_machine

    def entry(self, job: Job) -> Entry:
        """The job as the queue sees it."""
        return Entry(job.id, job.spec.priority, job.queued_s or job.submitted_s, checking.needs(job.spec))

    def _refuse_unless(self, job: Job, what: str) -> None:
        if job.state not in ("failed", "killed"):
            advice = "submit it again" if job.state == "finished" else "cancel it first"
            raise StateError(f"job {job.id} is {job.state}; {what} is for jobs that failed or were killed; {advice}")

    def _again(self, job: Job, what: str, *, resume: bool) -> Mapping[str, Any]:
        self._refuse_unless(job, what)
        again = {"state": "queued", "cancel": False, "resume": resume, "failures": 0, "reason": ""}
        return again | {"queued_s": time.time(), "ended_s": 0.0}

    def _logs(
        self, job: Job, number: int | None, node: int, tail: int | None, follow: Callable[[], bool] | None, since: str
    ) -> Iterator[bytes]:
        job = self.record.get(job.id)
        while follow is not None and follow() and _is_to_come(job, number):
            yield b""
            time.sleep(_PAUSE_S)
            job = self.record.get(job.id)
        chosen = next((one for one in job.attempts if one.number == number), None) if number else job.attempt
        if chosen is None:
            return
        kept = orders.attempt_folder(self.settings, job.id, chosen.number) / LOG.replace("0", str(node))
        if not since and (chosen.ended_s or job.has_ended) and kept.exists():
            yield from log_file.read(kept, tail=tail)
            return
        backend, has_told = self.backend(job.spec.backend), False
        try:
            for piece in backend.logs(chosen.name, chosen.handle, node=node, tail=tail, follow=follow, since=since):
                has_told = has_told or bool(piece)
                yield piece
        except BackendError:
            # What was kept here is better than nothing, and worse than the same lines twice.
            if has_told or since or not kept.exists():
                raise
            yield from log_file.read(kept, tail=tail)


def _is_to_come(job: Job, number: int | None) -> bool:
    """Whether an attempt's log, None: the newest's, has not begun: its backend may not have all of it yet."""
    if job.has_ended or job.attempt is None:
        return not job.has_ended
    return job.state == "starting" and number in (None, job.attempt.number)


def _cursor(job: Job) -> str:
    return base64.urlsafe_b64encode(json.dumps([job.submitted_s, job.id]).encode()).decode().rstrip("=")


def _place(cursor: str) -> tuple[float, str]:
    try:
        submitted_s, job_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return -float(submitted_s), _last(str(job_id))
    except (binascii.Error, ValueError, TypeError, OverflowError, RecursionError):
        raise ConfigError(f"cursor: {cursor!r} is none; take `next` of the page before") from None


def _last(job_id: str) -> str:
    """A key by which ids are in the reverse of their order."""
    return job_id.translate(_REVERSED)


_DIGITS = "0123456789abcdef"
_REVERSED = str.maketrans(_DIGITS, _DIGITS[::-1])
