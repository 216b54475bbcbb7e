"""The record of jobs: their MLflow runs, and a copy of what they say in memory. Imports no torch.

Every change is written to MLflow first; memory follows when that has it. So whatever becomes of this process, the next
one finds what was true. The run's tags decide; its status, which the workers set too, is put right after them.

Reading thousands of runs takes minutes. The jobs that have not ended are read first, which is all that moving jobs on
needs; the others follow, and until then one that is asked for by its id is read by itself.
"""

import contextlib
import logging
import re
import threading
import time
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from service import artifact_places, run_creation, store
from service.errors import StateError, TrackingError, UnknownJobError
from service.jobs import creation, job_tags, orders, runs
from service.jobs.doubts import Doubts
from service.jobs.job import STATUS, TRANSITIONS, Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from service.jobs.turns import Turns
from service.jobs.twins import Twins

_log = logging.getLogger(__name__)

_ID, _DIGITS = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]+")


class Record:
    """The only writer of jobs' tags. Thread-safe.

    What was not loaded yet of what it is asked for is loaded first.

    Attributes:
        uri: MLflow.
        listeners: called, each with the job, after every change and every new job.
        is_read_beside: somebody calls `load_more` until all is there, which `jobs` does not wait for, and `sort_out`.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self.uri = orders.tracking_uri(settings)
        self.listeners: list[Callable[[Job], None]] = []
        self._settings, self._roots = settings, artifact_places.absolute(settings.artifact_roots)
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
        self._doubts = Doubts()
        self._twins = Twins(self.uri)
        self._placed = ""  # the run whose artifacts lie where they may, which never changes
        self.is_read_beside = self._has_open = self._has_all = False
        # While ended jobs are read: what is left of them, and a job of each key.
        self._pages = runs.Pages(self.uri)
        self._first: dict[str, str] = {}
        # Whoever has read them before they were forgotten does not bring them back.
        self._dropped: set[str] = set()
        self._lock = threading.RLock()
        self._loading, self._creating = threading.Lock(), threading.Lock()
        self._changing = Turns()

    @property
    def is_partial(self) -> bool:
        """Whether `jobs` lacks some that have ended, because they are still being read."""
        return self.is_read_beside and not self._has_all

    @property
    def is_in_memory(self) -> bool:
        """Whether `jobs` has nothing to read first."""
        return self._has_all or (self.is_read_beside and self._has_open)

    def load_open(self) -> None:
        """Fill memory with the jobs that have not ended, the first time; raises TrackingError."""
        if not self._has_open:
            with self._loading:
                if not self._has_open:
                    self._load_open()

    def load_more(self) -> bool:
        """Read the next ones of all jobs, the newest first; whether there are more. Raises TrackingError."""
        self.load_open()
        with self._loading:
            if not self._has_all:
                found = self._pages.read()
                self._take(found)
                self._note_twins(found)
                if not self.is_read_beside:
                    self.sort_out()
                if self._pages.is_last:
                    self._has_all = True
                    self._first = {}
            return not self._has_all

    def load(self) -> None:
        """Fill memory with all jobs, the first time; raises TrackingError."""
        while self.load_more():
            pass

    def reload(self) -> None:
        """Read again what another process has written; for who changes nothing meanwhile. Raises TrackingError."""
        with self._loading:
            self._load_open()

    def _load_open(self) -> None:
        store.ensure_ready(self.uri)
        found = runs.open_ones(self.uri)
        with self._lock:
            self._jobs, self._order, self._open, self._keys, self._owed = {}, [], set(), {}, set()
            self._pages, self._first, self._dropped, self._has_all = runs.Pages(self.uri), {}, set(), False
            self._take(found)
            self._note_twins(found)
            self._has_open = True

    def _take(self, found: list[runs.Found]) -> None:
        """Have these in memory too. What is there may have been changed since MLflow was asked, and stays."""
        with self._lock:
            for one in found:
                job = one.job
                if job.id not in self._jobs and job.id not in self._dropped:
                    self._put(job)
                    if not one.is_settled:
                        self._owed.add(job.id)

    def _note_twins(self, found: list[runs.Found]) -> None:
        for one in found:
            if self._first.setdefault(one.key, one.job.id) != one.job.id:
                self._twins.found(one.key)

    def _put(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._newest = None
        insort(self._order, (job.submitted_s, job.id))
        if not job.has_ended:
            self._open.add(job.id)
        self._keys.setdefault((job.owner, job.key), job.id)

    def sort_out(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Delete twins that were read, or were made since a creation that was not answered.

        Raises:
            TrackingError: MLflow does not answer. A key that it refuses is looked at again later.
        """
        self._twins.look(self._sorted, self.ask, is_over)

    def is_sole(self, job_id: str) -> bool:
        """Whether a job that has never begun may begin: it is no twin of another. Raises TrackingError.

        While ended jobs are read or twins expected, this asks MLflow: another one may be the job, this one its twin.
        """
        if self._has_all and not self._twins.are_expected:
            return True
        with self._doubts.of(job_id), store.explained(self.uri):
            key = store.client(self.uri).get_run(job_id).data.tags.get(job_tags.KEY, "")
        return not run_creation.is_key(key) or self._sorted(key).kept in (None, job_id)

    def _sorted(self, key: str) -> run_creation.Sorted:
        """Have of the runs of a key the one that stays in memory; its twins are deleted."""
        found = self._twins.sort_out(key)
        # Also one that MLflow does not delete: nobody is to wait for it, and it is not to be started.
        for job_id in found.spare:
            _log.warning("run %s is job %s once more and is deleted", job_id, found.kept)
            self.drop(job_id)
        if found.kept is not None and found.kept not in self._jobs:
            self._take(runs.one(self.uri, found.kept))
        return found

    def create(
        self, spec: JobSpec, resolved: Mapping[str, Any] | None = None, *, owner: str = "", key: str = ""
    ) -> tuple[Job, bool]:
        """A new job, and True; or the one that this owner's key has made before, and False.

        Args:
            resolved: the configuration that it is to start with; without: none, or it is resolved then.

        Raises:
            ConfigError: the record cannot hold it, or its experiment keeps artifacts where none may be kept.
            StateError: the key has made a job of another spec.
            TrackingError: the server does not answer; asking again with the key, or the one that this tells, is safe.
        """
        self.load_open()
        if not key:
            with creation.own_key() as own:
                return self._make(spec, resolved or {}, owner, own, is_own=True)
        if known := self._known(owner, key):
            return creation.same(known, spec), False
        # Two requests at once, be they another process's, are one after the other.
        with self._creating, creation.turn(self._settings):
            if known := self._known(owner, key):
                return creation.same(known, spec), False
            job, is_new = self._make(spec, resolved or {}, owner, key, is_own=False)
            return (job if is_new else creation.same(job, spec)), is_new

    def get(self, job_id: str) -> Job:
        """The job of this id; raises UnknownJobError, and TrackingError where it has to be read first."""
        self.load_open()
        # Before the look: what comes between the two is found.
        is_read = self._has_all
        with self._lock:
            job = self._jobs.get(job_id)
        if job is None and not is_read and _ID.fullmatch(job_id):
            self._take(runs.one(self.uri, job_id))
            with self._lock:
                job = self._jobs.get(job_id)
        if job is None:
            raise UnknownJobError(f"there is no job {job_id!r}; `lorot jobs` lists them")
        return job

    def jobs(self) -> list[Job]:
        """All, the newest first; see `is_partial`."""
        if not self.is_read_beside:
            self.load()
        self.load_open()
        with self._lock:
            if self._newest is None:
                self._newest = [self._jobs[job_id] for _, job_id in reversed(self._order)]
            return self._newest.copy()

    def beginning_with(self, prefix: str) -> list[Job]:
        """The jobs whose id begins so; raises TrackingError where they have to be read first."""
        self.load_open()
        if not self._has_all and _DIGITS.fullmatch(prefix):
            self._take(runs.beginning_with(self.uri, prefix))
        with self._lock:
            return [job for job_id, job in self._jobs.items() if job_id.startswith(prefix)]

    def open_jobs(self) -> list[Job]:
        """Those that have not ended, in no order."""
        self.load_open()
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
        with self._changing.of(job_id):
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
                with self._changing.of(job_id):
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
            return [self._jobs[job_id] for job_id in self._doubts.ids() if job_id in self._jobs]

    def is_deleted(self, job_id: str) -> bool:
        """Whether somebody has deleted the job's run in MLflow; raises TrackingError.

        A run that MLflow has never heard of is none: then it may be another database.
        """
        with store.explained(self.uri), store.passing_over("RESOURCE_DOES_NOT_EXIST"):
            if store.client(self.uri).get_run(job_id).info.lifecycle_stage == "deleted":
                return True
        self._doubts.clear(job_id)
        return False

    def drop(self, job_id: str) -> None:
        """Forget a job whose run is deleted."""
        with self._changing.of(job_id), self._lock:
            self._dropped.add(job_id)
            if (job := self._jobs.pop(job_id, None)) is None:
                return
            self._newest = None
            self._order.remove((job.submitted_s, job_id))
            if self._keys.get((job.owner, job.key)) == job_id:
                del self._keys[job.owner, job.key]
            for noted in (self._open, self._owed):
                noted.discard(job_id)
            self._doubts.clear(job_id)
            self._unsure.pop(job_id, None)

    def upload(self, job_id: str, path: Path, subfolder: str | None = None) -> None:
        """Keep a file, or a folder's content, as an artifact of the job's run; raises TrackingError, PlaceError."""
        with store.explained(self.uri):
            api = store.client(self.uri)
            if job_id != self._placed:
                artifact_places.refuse_foreign(api.get_run(job_id).info.artifact_uri, self.uri, self._roots)
                self._placed = job_id
            (api.log_artifacts if path.is_dir() else api.log_artifact)(job_id, str(path), subfolder)

    def configuration(self, job_id: str) -> dict[str, Any] | None:
        """What the job was resolved to when it was submitted; None: nothing was recorded. Raises TrackingError.

        Asked for, and not kept: all jobs' together would take more memory than the jobs themselves.
        """
        with self._doubts.of(job_id), store.explained(self.uri):
            return job_tags.decode_config(store.client(self.uri).get_run(job_id).data.tags)

    def _write(self, before: Job, after: Job) -> None:
        """Set the tags that differ; all of them where nobody knows what an earlier write has left."""
        job_id = after.id
        tags = job_tags.changed(before, after)
        if job_id in self._unsure:
            tags = job_tags.everything(after, self._unsure[job_id] | tags.keys())
        try:
            with self._doubts.of(job_id):
                run_creation.set_tags(self.uri, job_id, tags)
        except BaseException:
            self._unsure.setdefault(job_id, set()).update(tags)
            raise
        self._unsure.pop(job_id, None)

    def _known(self, owner: str, key: str) -> Job | None:
        with self._lock:
            known = self._jobs.get(self._keys.get((owner, key), ""))
        return known if known and (known.attempts or self.is_sole(known.id)) else None

    def _make(self, spec: JobSpec, resolved: Mapping[str, Any], owner: str, key: str, is_own: bool) -> tuple[Job, bool]:
        with self._twins.making(job_tags.run_key(owner, key)):
            job, made = creation.make(self._settings, self.uri, spec, resolved, owner, key, is_own)
        self._twins.made(made.key, job.id, is_alone=made.is_alone)
        return self._added(job), made.is_new

    def _added(self, job: Job) -> Job:
        with self._lock:
            if job.id in self._jobs:
                return self._jobs[job.id]
            self._put(job)
            if not job.has_ended:
                self._owed.add(job.id)
        with self._changing.of(job.id), contextlib.suppress(TrackingError):
            self._settle(self.get(job.id))
        # One that has ended was not read yet, and is nothing new.
        if not job.has_ended:
            self._tell(job)
        return job

    def _settle(self, job: Job) -> None:
        """Let MLflow's status of the run say what the job's state does."""
        if job.id not in self._owed:
            return
        with self._doubts.of(job.id), store.explained(self.uri):
            api = store.client(self.uri)
            if job.has_ended:
                api.set_terminated(job.id, STATUS[job.state], int(1000 * (job.ended_s or time.time())))
            else:
                api.update_run(job.id, status=STATUS[job.state])
        with self._lock:
            self._owed.discard(job.id)

    def _tell(self, job: Job) -> None:
        for listener in tuple(self.listeners):
            try:
                listener(job)
            except Exception:
                _log.exception("a listener to jobs failed at job %s", job.id)
