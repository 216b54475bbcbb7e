"""The record of jobs: their MLflow runs, and a copy of what they say in memory. Imports no torch.

Every change is written to MLflow first; memory follows when that has it. So whatever becomes of this process, the next
one finds what was true. The run's tags decide; its status, which the workers set too, is put right after them.
"""

import contextlib
import fcntl
import logging
import os
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from service import run_creation, store
from service.errors import StateError, StorageError, TrackingError, UnknownJobError
from service.jobs import job_tags, orders
from service.jobs.job import STATUS, TRANSITIONS, Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec

_log = logging.getLogger(__name__)

# Runs come whole, with all their parameters and metrics: few at once, or they take more memory than all jobs do.
_PAGE = 100
_NUM_LOCKS = 64


class Record:
    """The only writer of jobs' tags. Thread-safe.

    What is asked of it before `load` was called loads it first.

    Attributes:
        uri: MLflow.
        listeners: called, each with the job, after every change and every new job.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self.uri = orders.tracking_uri(settings)
        self.listeners: list[Callable[[Job], None]] = []
        self._settings = settings
        self._jobs: dict[str, Job] = {}
        self._order: list[tuple[float, str]] = []
        # The same as jobs, the newest first; made when it is asked for.
        self._newest: list[Job] | None = None
        self._open: set[str] = set()
        self._keys: dict[tuple[str, str], str] = {}
        # Jobs whose run's status was not put right yet.
        self._owed: set[str] = set()
        # Jobs with a write whose answer was lost: the names of the tags that it may have set.
        self._unsure: dict[str, set[str]] = {}
        # Jobs that MLflow has refused something of.
        self._doubted: set[str] = set()
        self._is_loaded = False
        self._lock = threading.RLock()
        self._loading = threading.Lock()
        self._creating = threading.Lock()
        self._changing = tuple(threading.Lock() for _ in range(_NUM_LOCKS))

    def load(self) -> None:
        """Fill memory from MLflow, the first time; raises TrackingError."""
        with self._loading:
            if not self._is_loaded:
                self._load()

    def reload(self) -> None:
        """Read again what another process has written; for who changes nothing meanwhile. Raises TrackingError."""
        with self._loading:
            self._load()

    def _load(self) -> None:
        store.ensure_ready(self.uri)
        with store.explained(self.uri):
            found, statuses = self._read()
        with self._lock:
            self._jobs = found
            self._order = sorted((job.submitted_s, job.id) for job in found.values())
            self._newest = None
            self._open = {job.id for job in found.values() if not job.has_ended}
            self._keys = {(job.owner, job.key): job.id for job in found.values() if job.key}
            # Of those that run, their workers have a word in it.
            self._owed = {
                job.id
                for job in found.values()
                if (job.has_ended or job.state == "queued") and statuses[job.id] != STATUS[job.state]
            }
            self._is_loaded = True

    def create(self, spec: JobSpec, *, owner: str = "", key: str = "") -> tuple[Job, bool]:
        """A new job, and True; or the one that this owner's key has made before, and False.

        Raises:
            StateError: the key has made a job of another spec.
            TrackingError: the server does not answer; whether there is a job now, asking again with the key will tell.
        """
        self._ensure_loaded()
        if not key:
            return self._added(self._make(spec, owner, "")[0]), True
        with self._lock:
            known = self._jobs.get(self._keys.get((owner, key), ""))
        if known is not None:
            return _same(known, spec), False
        # Two requests at once, be they another process's, are one after the other.
        with self._creating, self._creating_elsewhere():
            with self._lock:
                known = self._jobs.get(self._keys.get((owner, key), ""))
            if known is not None:
                return _same(known, spec), False
            made, is_new = self._make(spec, owner, key)
            return (self._added(made), True) if is_new else (_same(self._added(made), spec), False)

    def get(self, job_id: str) -> Job:
        """The job of this id; raises UnknownJobError."""
        self._ensure_loaded()
        with self._lock:
            job = self._jobs.get(job_id)
        if job is None:
            raise UnknownJobError(f"there is no job {job_id!r}; `lorot jobs` lists them")
        return job

    def jobs(self) -> list[Job]:
        """All, the newest first."""
        self._ensure_loaded()
        with self._lock:
            if self._newest is None:
                self._newest = [self._jobs[job_id] for _, job_id in reversed(self._order)]
            return self._newest.copy()

    def beginning_with(self, prefix: str) -> list[Job]:
        """The jobs whose id begins so."""
        self._ensure_loaded()
        with self._lock:
            return [job for job_id, job in self._jobs.items() if job_id.startswith(prefix)]

    def open_jobs(self) -> list[Job]:
        """Those that have not ended, in no order."""
        self._ensure_loaded()
        with self._lock:
            return [self._jobs[job_id] for job_id in self._open]

    def change(self, job_id: str, **fields: Any) -> Job:
        """Set fields of a job; see `update`."""
        return self.update(job_id, lambda job: fields)

    def update(self, job_id: str, decide: Callable[[Job], Mapping[str, Any]]) -> Job:
        """Set the fields that `decide` names when it sees the job; nobody else changes it meanwhile.

        Raises:
            StateError: the job's state cannot become that one.
            TrackingError: it could not be recorded, and nothing has changed.
            UnknownJobError: there is no such job.
        """
        with self._changing[hash(job_id) % _NUM_LOCKS]:
            before = self.get(job_id)
            after = replace(before, **decide(before))
            if after == before:
                return before
            if after.state != before.state and after.state not in TRANSITIONS[before.state]:
                raise StateError(f"job {job_id} is {before.state}; it cannot become {after.state} from there")
            self._write(before, after)
            with self._lock:
                self._jobs[job_id] = after
                self._newest = None
                (self._open.discard if after.has_ended else self._open.add)(job_id)
                if STATUS[after.state] != STATUS[before.state] or after.has_ended:
                    self._owed.add(job_id)
            with contextlib.suppress(TrackingError):
                self._settle(after)
        self._tell(after)
        return after

    def settle(self) -> None:
        """Put the status of runs right where that has failed before; raises TrackingError if MLflow does not answer."""
        with self._lock:
            owed = sorted(self._owed)
        for job_id in owed:
            try:
                with self._changing[hash(job_id) % _NUM_LOCKS]:
                    self._settle(self.get(job_id))
            except UnknownJobError:
                continue
            except TrackingError:
                # One run may be refused; the others are not to wait for it.
                self.ask()

    def ask(self) -> None:
        """Put a small question to MLflow; raises TrackingError if it does not answer."""
        store.ensure_ready(self.uri)
        with store.explained(self.uri):
            store.client(self.uri).search_experiments(max_results=1)

    def doubted(self) -> list[Job]:
        """The jobs that MLflow has refused something of, since `is_deleted` last said no."""
        with self._lock:
            return [self._jobs[job_id] for job_id in sorted(self._doubted) if job_id in self._jobs]

    def is_deleted(self, job_id: str) -> bool:
        """Whether somebody has deleted the job's run in MLflow; raises TrackingError.

        A run that MLflow has never heard of is none: then it may be another database.
        """
        with store.explained(self.uri), store.passing_over("RESOURCE_DOES_NOT_EXIST"):
            if store.client(self.uri).get_run(job_id).info.lifecycle_stage == "deleted":
                return True
        with self._lock:
            self._doubted.discard(job_id)
        return False

    def drop(self, job_id: str) -> None:
        """Forget a job whose run is deleted."""
        with self._changing[hash(job_id) % _NUM_LOCKS], self._lock:
            job = self._jobs.pop(job_id, None)
            if job is None:
                return
            self._newest = None
            self._order.remove((job.submitted_s, job_id))
            if self._keys.get((job.owner, job.key)) == job_id:
                del self._keys[job.owner, job.key]
            for noted in (self._open, self._owed, self._doubted):
                noted.discard(job_id)
            self._unsure.pop(job_id, None)

    def upload(self, job_id: str, path: Path, subfolder: str | None = None) -> None:
        """Keep a file, or a folder's content, as an artifact of the job's run; raises TrackingError."""
        with store.explained(self.uri):
            api = store.client(self.uri)
            (api.log_artifacts if path.is_dir() else api.log_artifact)(job_id, str(path), subfolder)

    def log_text(self, job_id: str, text: str, name: str) -> None:
        """Keep a text as the artifact `name`; raises TrackingError."""
        with store.explained(self.uri):
            store.client(self.uri).log_text(job_id, text, name)

    def _ensure_loaded(self) -> None:
        if not self._is_loaded:
            self.load()

    def _write(self, before: Job, after: Job) -> None:
        """Set the tags that differ; all of them where nobody knows what an earlier write has left."""
        job_id = after.id
        tags = job_tags.changed(before, after)
        if job_id in self._unsure:
            tags = job_tags.everything(after, self._unsure[job_id] | tags.keys())
        try:
            with self._doubting(job_id):
                run_creation.set_tags(self.uri, job_id, tags)
        except BaseException:
            self._unsure.setdefault(job_id, set()).update(tags)
            raise
        self._unsure.pop(job_id, None)

    @contextlib.contextmanager
    def _doubting(self, job_id: str) -> Iterator[None]:
        """Note the job if MLflow, which answers, refuses what is done inside."""
        try:
            yield
        except store.UnreachableError:
            raise
        except TrackingError:
            with self._lock:
                self._doubted.add(job_id)
            raise

    def _read(self) -> tuple[dict[str, Job], dict[str, str]]:
        """All jobs of MLflow, and what status their runs have."""
        api = store.client(self.uri)
        experiments = [str(one.experiment_id) for one in store.pages(api.search_experiments)]
        found: dict[str, Job] = {}
        statuses: dict[str, str] = {}
        by_key: dict[str, list[str]] = {}
        told: set[str] = set()
        if not experiments:
            return found, statuses
        search = {"experiment_ids": experiments, "filter_string": f"tags.`{job_tags.JOB}` = '1'", "max_results": _PAGE}
        for run in store.pages(api.search_runs, order_by=["attributes.start_time ASC"], **search):
            job_id, tags = str(run.info.run_id), run.data.tags
            try:
                job = job_tags.decode(job_id, str(run.info.experiment_id), tags)
            except (ValueError, TypeError) as error:
                _log.warning("run %s has tags of a job that cannot be read and is left alone: %s", job_id, error)
                continue
            by_key.setdefault(tags.get(job_tags.KEY, job_id), []).append(job_id)
            if tags.get(job_tags.TOLD):
                told.add(job_id)
            found[job_id], statuses[job_id] = job, str(run.info.status)
        for twins in by_key.values():
            # A server may serve a question that was put again twice, the first one late: then that one is the earlier.
            kept = max(twins, key=lambda job_id: (bool(found[job_id].attempts), job_id in told))
            for job_id in twins:
                if job_id == kept or found[job_id].attempts:
                    continue
                _log.warning("run %s is job %s once more and is deleted", job_id, kept)
                with store.passing_over("RESOURCE_DOES_NOT_EXIST"):
                    api.delete_run(job_id)
                del found[job_id], statuses[job_id]
        return found, statuses

    def _make(self, spec: JobSpec, owner: str, key: str) -> tuple[Job, bool]:
        """Make the run of a new job, or find the one of this key."""
        now = time.time()
        draft = Job("", "", spec, "queued", owner, key, submitted_s=now, queued_s=now)
        run_key = job_tags.run_key(owner, key) if key else None
        experiment = orders.experiment(spec, self._settings)
        made = run_creation.create(self.uri, experiment, spec.name, tags=job_tags.encode(draft), key=run_key)
        # What has none of this is known by its attempts, or is the earliest.
        with contextlib.suppress(TrackingError):
            run_creation.set_tags(self.uri, made.run_id, {job_tags.TOLD: "1"})
        if made.is_new:
            return replace(draft, id=made.run_id, experiment_id=made.experiment_id), True
        with store.explained(self.uri):
            run = store.client(self.uri).get_run(made.run_id)
        try:
            job = job_tags.decode(made.run_id, str(run.info.experiment_id), run.data.tags)
        except ValueError as error:
            raise TrackingError(f"run {made.run_id} in {store.shown(self.uri)} is no job: {error}") from None
        return job, False

    def _added(self, job: Job) -> Job:
        with self._lock:
            if job.id in self._jobs:
                return self._jobs[job.id]
            self._jobs[job.id] = job
            self._newest = None
            insort(self._order, (job.submitted_s, job.id))
            if not job.has_ended:
                self._open.add(job.id)
                self._owed.add(job.id)
            if job.key:
                self._keys[job.owner, job.key] = job.id
        with self._changing[hash(job.id) % _NUM_LOCKS], contextlib.suppress(TrackingError):
            self._settle(self.get(job.id))
        self._tell(job)
        return job

    @contextlib.contextmanager
    def _creating_elsewhere(self) -> Iterator[None]:
        try:
            self._settings.state.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._settings.state / "submit.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageError(f"state: {self._settings.state} cannot be written ({error.strerror})") from None
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _settle(self, job: Job) -> None:
        """Let MLflow's status of the run say what the job's state does."""
        if job.id not in self._owed:
            return
        status = STATUS[job.state]
        with self._doubting(job.id), store.explained(self.uri):
            api = store.client(self.uri)
            if job.has_ended:
                api.set_terminated(job.id, status, int(1000 * (job.ended_s or time.time())))
            else:
                api.update_run(job.id, status=status)
        with self._lock:
            self._owed.discard(job.id)

    def _tell(self, job: Job) -> None:
        for listener in tuple(self.listeners):
            try:
                listener(job)
            except Exception:
                _log.exception("a listener to jobs failed at job %s", job.id)


def _same(job: Job, spec: JobSpec) -> Job:
    """The job, if it is one of this spec; raises StateError."""
    if job.spec != spec:
        raise StateError(
            f"key {job.key!r} has been used for job {job.id}, whose spec is another one; a new job needs a new key"
        )
    return job
