"""The life of an attempt: from the queue to the start, through what its backend tells, to its verdict. No torch.

Every step is written down before or after in such a way that it can be taken again: first that an attempt of this name
is being started, then the start, which has no effect the second time, then that it runs.
"""

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from service.artifact_places import PlaceError
from service.errors import BackendError, ConfigError, LorotError, StorageError, TrackingError
from service.jobs import checking, keeping, orders
from service.jobs.backends import Backend, Handle, Status
from service.jobs.desk import Desk
from service.jobs.job import KEPT_ATTEMPTS, Attempt, Job
from service.jobs.verdict import judge

_log = logging.getLogger(__name__)

# How long the record's stores are given for what an attempt has left, before its end is recorded without that.
PATIENCE_S = 300.0
# An attempt that lasted less has told nothing about the next one.
SHORT_S = 60.0
# The longest pause before another attempt.
LONGEST_PAUSE_S = 300.0
# So often and so long, seconds, may moving a job on fail in a row, before an attempt that does not get started is over.
TRIES = 5
REFUSED_S = 30.0
_GPUS = "gpus"
_TOO_LARGE = "it does not fit this machine any more"


class Attempts:
    """Moves single jobs on. Thread-safe; one call per job at a time is the caller's duty.

    Attributes:
        uncleared: the backends that may still have something of attempts that are over.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._record = desk.record
        self._settings = desk.settings
        # Of memory alone: after a restart a question is put once more, or a pause is not kept.
        self.uncleared: set[str] = set()
        self._asked: dict[str, float] = {}
        self._failed: dict[str, tuple[int, float]] = {}
        self._missed: dict[str, int] = {}
        self._busy_since: dict[str, float] = {}
        self._pauses: dict[str, tuple[float, float]] = {}

    def is_pausing(self, job: Job) -> bool:
        """Whether a job that has just failed is to wait a little before it is started again."""
        until, _ = self._pauses.get(job.id, (0.0, 0.0))
        return time.monotonic() < until

    def forget(self, job_id: str) -> None:
        """Drop what was noted of a job that has ended."""
        for noted in (self._asked, self._failed, self._missed, self._busy_since, self._pauses):
            noted.pop(job_id, None)

    def begin(self, job_id: str, gpus: tuple[int, ...] = ()) -> None:
        """Take a job from the queue: a new attempt, with these GPUs of this machine."""
        job = self._record.get(job_id)
        if job.state != "queued" or (not job.attempts and not self._record.is_sole(job_id)):
            return
        try:
            self._desk.backend(job.spec.backend)
        except ConfigError as error:
            self._say(job_id, str(error))
            return
        number = 1 + job.newest
        handle = {_GPUS: list(gpus)} if gpus else {}
        attempt = Attempt(number, f"lorot-{job.id[:12]}-{number}", handle)

        def decide(now: Job) -> Mapping[str, Any]:
            # Somebody may have cancelled it by now.
            if now.state != "queued" or now.attempts != job.attempts:
                return {}
            return {"state": "starting", "attempts": (*now.attempts, attempt)[-KEPT_ATTEMPTS:], "reason": ""}

        job = self._record.update(job.id, decide)
        if job.state == "starting" and job.attempt == attempt:
            self._launch(job, attempt, is_new=True)

    def advance(self, job_id: str) -> None:
        """Take note of where a job that was started stands, and do what follows.

        Raises:
            BackendError, TrackingError, StorageError: come back later.
        """
        # As it is now: what the caller has seen may be over.
        job = self._record.get(job_id)
        attempt = job.attempt
        if job.state == "queued" or job.has_ended:
            return
        assert attempt is not None, "it was started"
        try:
            self._desk.backend(job.spec.backend)
        except ConfigError as error:
            if job.cancel:
                self._end(job, attempt, Status("gone", reason=str(error)))
            else:
                self._record.change(job_id, reason=str(error))
            return
        if job.state == "starting":
            self._launch(job, attempt, is_new=False)
        else:
            self._look(job, attempt)

    def succeeded(self, job_id: str) -> None:
        """Moving it on has gone well: failures are counted anew."""
        self._failed.pop(job_id, None)

    def failed(self, job_id: str, error: Exception) -> None:
        """Moving it on has failed, by no fault of the places that it needs.

        An attempt that does not get started is over when that goes on. What runs is not given up for a question that
        nobody answers.

        Raises:
            TrackingError: come back later.
        """
        tries, since = self._failed.get(job_id, (0, time.monotonic()))
        self._failed[job_id] = tries + 1, since
        job = self._record.get(job_id)
        attempt = job.attempt
        is_patient = tries + 1 < TRIES or time.monotonic() - since < REFUSED_S
        if is_patient or job.state != "starting" or attempt is None:
            return
        with contextlib.suppress(LorotError):
            backend = self._desk.backend(job.spec.backend)
            backend.cancel(attempt.name, _theirs(attempt), job.spec.grace_s)
            if backend.status(attempt.name, _theirs(attempt)).phase == "running":
                return
        self._end(job, attempt, Status("gone", reason=f"it could not be started: {error}"))

    def is_said_too_large(self, job: Job) -> bool:
        """Whether its reason says that it does not fit this machine."""
        return job.reason.startswith(_TOO_LARGE)

    def fit(self, job_id: str, fits: bool) -> None:
        """Say of a job that waits that it is larger than this machine, or no longer that it is."""
        if fits:
            self._say(job_id, "", instead_of=_TOO_LARGE)
            return
        needs, has = checking.needs(self._record.get(job_id).spec), self._desk.capacity
        self._say(job_id, f"{_TOO_LARGE}: it needs {needs}, and there are {has}")

    def leave(self, job_id: str) -> None:
        """End a job if its run was deleted in MLflow: stop what runs of it, and forget it.

        Raises:
            BackendError, TrackingError: come back later.
        """
        if not self._record.is_deleted(job_id):
            return
        job = self._record.get(job_id)
        if job.attempt is not None and job.state != "queued" and not job.has_ended:
            with contextlib.suppress(ConfigError):
                backend = self._desk.backend(job.spec.backend)
                if backend.status(job.attempt.name, _theirs(job.attempt)).phase in ("waiting", "running"):
                    self._ask_to_stop(job, job.attempt, backend)
                    return
            self._clear(job, job.attempt)
        _log.warning("job %s: its run was deleted in MLflow; nothing is kept of it", job_id)
        self._record.drop(job_id)
        self.forget(job_id)

    def _say(self, job_id: str, reason: str, instead_of: str = "") -> None:
        """Why a job waits, unless it waits no longer."""

        def decide(now: Job) -> Mapping[str, Any]:
            return {"reason": reason} if now.state == "queued" and now.reason.startswith(instead_of) else {}

        self._record.update(job_id, decide)

    def _launch(self, job: Job, attempt: Attempt, *, is_new: bool) -> None:
        """Start it, or find it started; until it runs, again and again."""
        backend = self._desk.backend(job.spec.backend)
        if not is_new and (job.cancel or attempt.started_s):
            status = backend.status(attempt.name, _theirs(attempt))
            if job.cancel and status.phase == "gone":
                self._end(job, attempt, status)
                return
            if job.cancel and status.phase != "ended":
                self._ask_to_stop(job, attempt, backend)
                self._record.change(job.id, state="stopping")
                return
            if status.phase != "gone":
                self._note_start(job, attempt, status)
                return
        try:
            resolved = self._resolved(job)
            order = orders.order(job, attempt, self._settings, resolved, gpus_of(attempt))
            orders.prepare(order, self._settings, resolved)
            handle: Handle = backend.start(order)
        except (BackendError, TrackingError, StorageError):
            raise
        except OSError as error:
            raise StorageError(str(error)) from error
        except Exception as error:
            # What was started before the settings or the data changed goes on.
            if is_new or backend.status(attempt.name, _theirs(attempt)).phase == "gone":
                is_known = isinstance(error, LorotError)
                self._fail(job, attempt, str(error) if is_known else f"unexpected {type(error).__name__}: {error}")
                if not is_known:
                    _log.exception("%s could not be started", attempt.name)
                return
            handle = {}
        kept = {key: value for key, value in attempt.handle.items() if key == _GPUS}
        attempt = replace(attempt, handle={**handle, **kept}, started_s=time.time())
        status = backend.status(attempt.name, handle)
        if status.phase == "gone" and self._is_missed_again(job):
            self._end(job, attempt, status)
            return
        self._note_start(job, attempt, status)

    def _resolved(self, job: Job) -> dict[str, Any]:
        """The configuration that it starts with.

        Raises:
            ConfigError: it may not be started any more.
            TrackingError: the record does not answer.
        """
        return checking.starts_with(job.spec, self._settings, self._desk.recorded(job))

    def _note_start(self, job: Job, attempt: Attempt, status: Status) -> None:
        seen = _seen(attempt, status)
        # "starting" as long as it waits for something there: an image, a cluster's queue.
        state = "starting" if status.phase in ("waiting", "gone") else "running"
        self._record.change(job.id, state=state, attempts=(*job.attempts[:-1], seen))

    def _is_missed_again(self, job: Job) -> bool:
        """Whether it was gone at the last look too: an engine that has just come back may not know all it has yet."""
        self._missed[job.id] = 1 + self._missed.get(job.id, 0)
        return self._missed[job.id] > 1

    def _look(self, job: Job, attempt: Attempt) -> None:
        backend = self._desk.backend(job.spec.backend)
        status = backend.status(attempt.name, _theirs(attempt))
        if status.phase == "gone" and not self._is_missed_again(job):
            return
        if status.phase in ("ended", "gone"):
            self._end(job, attempt, status)
            return
        self._missed.pop(job.id, None)
        seen = _seen(attempt, status)
        # It had one while its backend was not set up.
        fields: dict[str, Any] = {"reason": ""} if job.reason else {}
        if seen != attempt:
            fields["attempts"] = (*job.attempts[:-1], seen)
        if job.cancel:
            self._ask_to_stop(job, attempt, backend)
            fields["state"] = "stopping"
        if fields:
            self._record.change(job.id, **fields)

    def _ask_to_stop(self, job: Job, attempt: Attempt, backend: Backend) -> None:
        """Once, and again when it should have been killed by then."""
        asked = self._asked.get(job.id)
        if asked is None or time.monotonic() - asked > job.spec.grace_s + 10:
            backend.cancel(attempt.name, _theirs(attempt), job.spec.grace_s)
            self._asked[job.id] = time.monotonic()

    def _end(self, job: Job, attempt: Attempt, status: Status) -> None:
        """Record the end of the newest attempt, with all it has left, and what follows from it."""
        if status.phase == "gone" and keeping.is_done(job, attempt, self._settings):
            # Whoever would have told how it ended was killed after the work was done.
            status = replace(status, phase="ended", exit_code=0, reason="")
        told = keeping.said(job, attempt, self._settings)
        missing = self._kept(job, status, told)
        ended = replace(_seen(attempt, status), ended_s=status.ended_s or time.time(), exit_code=status.exit_code)

        is_ended = False

        def decide(now: Job) -> Mapping[str, Any]:
            nonlocal is_ended
            if not _is_under_way(now, attempt):
                return {}
            is_ended = True
            verdict = judge(now, status, told)
            reason = "; ".join(filter(None, [verdict.reason, missing]))
            fields = verdict.fields() | {"reason": reason}
            if verdict.state != "queued":
                fields["ended_s"] = ended.ended_s
            return fields | {"attempts": (*now.attempts[:-1], replace(ended, reason=verdict.reason))}

        after = self._record.update(job.id, decide)
        if not is_ended:
            return
        self._busy_since.pop(job.id, None)
        if after.state == "queued":
            self._pause(after, ended)
        else:
            self.forget(job.id)
        self._clear(job, attempt)

    def _kept(self, job: Job, status: Status, told: str) -> str:
        """Keep what the attempt has left; returns what could not be, for people; "" if all is well."""
        try:
            keeping.send_records(job, self._settings, self._record.uri)
            if judge(job, status, told).state != "queued":
                keeping.keep(job, self._settings, self._record)
        except (keeping.BusyError, TrackingError) as error:
            # Where MLflow itself is away, nothing can be recorded, and patience costs nothing.
            self._record.ask()
            since = self._busy_since.setdefault(job.id, time.monotonic())
            if time.monotonic() - since < PATIENCE_S:
                raise keeping.BusyError(str(error)) from error
            _log.warning("job %s: not all of it could be kept: %s", job.id, error)
            return f"not all that it left could be kept: {error}"
        except PlaceError as error:
            return f"what it left is not kept: {error}"
        return ""

    def _fail(self, job: Job, attempt: Attempt, reason: str) -> None:
        """It cannot be started at all."""
        now_s = time.time()
        ended = replace(attempt, ended_s=now_s, reason=reason)

        def decide(now: Job) -> Mapping[str, Any]:
            if not _is_under_way(now, attempt):
                return {}
            state = "killed" if now.cancel else "failed"
            return {"state": state, "reason": reason, "ended_s": now_s, "attempts": (*now.attempts[:-1], ended)}

        self._record.update(job.id, decide)
        self.forget(job.id)
        self._clear(job, attempt)

    def _pause(self, job: Job, ended: Attempt) -> None:
        """Let another attempt wait the longer, the more have ended at once in a row."""
        _, before = self._pauses.get(job.id, (0.0, 0.0))
        is_short = ended.ended_s - ended.started_s < SHORT_S
        pause_s = min(LONGEST_PAUSE_S, 2 * before or self._settings.poll_s) if is_short else 0.0
        self._pauses[job.id] = (time.monotonic() + pause_s, pause_s)
        for noted in (self._asked, self._failed, self._missed):
            noted.pop(job.id, None)

    def _clear(self, job: Job, attempt: Attempt) -> None:
        try:
            self._desk.backend(job.spec.backend).remove(attempt.name, _theirs(attempt))
        except ConfigError as error:
            _log.warning("%s is not cleared away: %s", attempt.name, error)
        except LorotError as error:
            self.uncleared.add(job.spec.backend)
            _log.warning("%s could not be cleared away: %s", attempt.name, error)


def gpus_of(attempt: Attempt | None) -> tuple[int, ...]:
    """This machine's GPUs that an attempt has."""
    return tuple(int(index) for index in (attempt.handle.get(_GPUS, ()) if attempt is not None else ()))


def _is_under_way(job: Job, attempt: Attempt) -> bool:
    """Whether this attempt is the one whose end decides on the job."""
    newest = job.attempt
    return job.state in ("starting", "running", "stopping") and newest is not None and newest.number == attempt.number


def _seen(attempt: Attempt, status: Status) -> Attempt:
    """The attempt with what its backend tells of it."""
    digest, started_s = status.image_digest or attempt.image_digest, status.started_s or attempt.started_s
    return replace(attempt, image_digest=digest, started_s=started_s)


def _theirs(attempt: Attempt) -> dict[str, Any]:
    """The handle as the backend gave it."""
    return {key: value for key, value in attempt.handle.items() if key != _GPUS}
