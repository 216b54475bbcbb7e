"""The loop that moves jobs on: what ended is recorded, what is cancelled stopped, what has its turn started. No torch.

It looks at where things stand and does what is missing, again and again. So it has nothing to remember: killed at any
moment, the next one goes on from the record and from what runs. Where MLflow is away, nothing new is started, what runs
goes on, and each change is made once it can be recorded. Where a backend is away, its jobs stay as they are.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

from service.errors import BackendError, LorotError, StorageError, TrackingError, UnknownJobError
from service.jobs import attempts, checking, queue, service_lock, traits
from service.jobs.attempts import Attempts
from service.jobs.backends import Backend, enabled
from service.jobs.desk import Desk
from service.jobs.job import Job
from service.jobs.keeping import BusyError

_log = logging.getLogger(__name__)

_MLFLOW = "mlflow"
_SERVICE = "service"
_STORAGE = "storage"
# Calls at once to one backend. Each has its own threads, so that a slow one keeps nobody else waiting.
_NUM_THREADS = 6
# How long a round waits for the calls that it has begun; the rest are looked for in the next one.
_PATIENCE_S = 5.0
# Between two questions to a backend that did not answer, and to an MLflow or a disk that nothing was to be written to.
_PROBE_S, _ASK_S = 5.0, 15.0


class Controller:
    """One for each record: a lock in `settings.state` sees to that.

    Attributes:
        last_round_s: when the last round ended, seconds since the epoch; 0: none has.
        on_round: called with how long it took, seconds, after every round.
        problems: "mlflow", "storage", a backend's name or "service": what is wrong there now. One job that is refused
            where others are served is none.
        on_read: called once all of the record is read.
        on_change: called with the job after every change of one, on any thread; a slow one holds the service up.
    """

    def __init__(self, desk: Desk) -> None:
        self.last_round_s = 0.0
        self.on_round: list[Callable[[float], None]] = []
        self.on_read: list[Callable[[], None]] = []
        self.problems: dict[str, str] = {}
        self.on_change: list[Callable[[Job], None]] = desk.record.listeners
        self._desk = desk
        self._record = desk.record
        self._attempts = Attempts(desk)
        self._calling = threading.Lock()
        self._busy: dict[str, Future[None]] = {}
        # The GPUs that a job in `_busy` was given; the record may not know of them yet.
        self._given: dict[str, tuple[int, ...]] = {}
        self._told: dict[str, str] = {}
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._unreconciled = self._attempts.uncleared
        self._probed: dict[str, float] = {}
        self._is_loaded = False
        # MLflow has just been read, or is about to be.
        self._asked = {_MLFLOW: time.monotonic()}
        self._lock = -1
        self._stopping = threading.Event()
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._reader: threading.Thread | None = None

    @property
    def is_well(self) -> bool:
        """Whether jobs are moved on: what is open of the record is loaded, it answers, and the loop turns."""
        turns = self._thread is None or self._thread.is_alive()
        return self._is_loaded and turns and not self.problems.keys() & {_MLFLOW, _SERVICE, _STORAGE}

    def start(self) -> None:
        """Take the lock, load what is open of the record, see what runs, and begin; the rest is read meanwhile.

        Where MLflow is away, that comes when it is back.

        Raises:
            TakenError: another service works on this record; which.
            StorageError: the state's folder cannot be written.
        """
        self._record.is_read_beside = True
        self.open()
        self._reader = threading.Thread(target=self._read_on, name="lorot-record", daemon=True)
        self._reader.start()
        self._thread = threading.Thread(target=self._work, name="lorot-jobs", daemon=True)
        self._thread.start()

    def open(self) -> None:
        """As `start`, without the thread: `step` is called by hand."""
        self._lock = service_lock.take(self._desk.settings.state)
        self._unreconciled.update(self._desk.backends(), enabled(self._desk.settings))
        self._is_ready()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loop; jobs go on. What is under way is waited for, up to `timeout_s`."""
        self._stopping.set()
        deadline = time.monotonic() + timeout_s
        for thread in filter(None, (self._thread, self._reader)):
            thread.join(max(0.0, deadline - time.monotonic()))
        wait(list(self._busy.values()), max(0.0, deadline - time.monotonic()))
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for backend in self._desk.backends().values():
            with contextlib.suppress(LorotError):
                backend.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def step(self) -> None:
        """One round: ended -> recorded, cancelled -> stopped, next -> started. Raises nothing."""
        with self._stepping:
            began = time.monotonic()
            try:
                if self._is_ready():
                    self._round()
                self.problems.pop(_SERVICE, None)
            except Exception as error:
                _log.exception("a round failed")
                self.problems[_SERVICE] = f"unexpected {type(error).__name__}: {error}"
            self.last_round_s = time.time()
            for told in self.on_round:
                told(time.monotonic() - began)

    def _work(self) -> None:
        while not self._stopping.is_set():
            self.step()
            self._stopping.wait(self._desk.settings.poll_s)

    def _read_on(self) -> None:
        """Read what is left of the record, and leave as much time as that computes to those who ask."""
        while not self._stopping.is_set():
            began = time.thread_time()
            pause_s = _PROBE_S
            try:
                if self._is_loaded:
                    if not self._record.load_more():
                        for told in self.on_read:
                            told()
                        return
                    pause_s = time.thread_time() - began
            except Exception as error:
                self._tell("what is left of the record", error)
            self._stopping.wait(pause_s)

    def _round(self) -> None:
        if not self._is_due(_MLFLOW) or self._is_well_at(_MLFLOW):
            with self._noting(_MLFLOW):
                self._record.settle()
                self._record.sort_out(self._stopping.is_set)
        if self._is_due(_STORAGE):
            self._is_well_at(_STORAGE)
        self._probe()
        doubted = {job.id: job for job in self._record.doubted()}
        self._do([(job, partial(self._attempts.leave, job.id)) for job in doubted.values()])
        started = [job for job in self._record.open_jobs() if job.state != "queued" and job.id not in doubted]
        self._do([(job, partial(self._attempts.advance, job.id)) for job in started], {})
        # Nothing is taken from the queue that could not be recorded or written down.
        if not self.problems.keys() & {_MLFLOW, _STORAGE}:
            turns = [(job, gpus) for job, gpus in self._next() if job.id not in doubted]
            given = {job.id: gpus for job, gpus in turns}
            self._do([(job, partial(self._attempts.begin, job.id, gpus)) for job, gpus in turns], given)

    def _next(self) -> list[tuple[Job, tuple[int, ...]]]:
        """The jobs whose turn it is, each with its GPUs of this machine."""
        # First who is busy: whoever is through by then shows in the record.
        with self._calling:
            busy, given = set(self._busy), dict(self._given)
        jobs = {job.id: job for job in self._record.open_jobs()}
        here = {job_id for job_id, job in jobs.items() if self._desk.counts(job)}
        # One that is being started is still queued in the record for a moment.
        takes = [jobs[job_id] for job_id in here if jobs[job_id].state != "queued" or job_id in given]
        ready = [
            job
            for job in jobs.values()
            if job.state == "queued"
            and job.id not in busy
            and job.spec.backend not in self.problems
            and not self._attempts.is_pausing(job)
        ]
        fits = {job.id: checking.needs(job.spec).fits(self._desk.capacity) for job in ready if job.id in here}
        changed = [
            jobs[job_id] for job_id, fit in fits.items() if fit == self._attempts.is_said_too_large(jobs[job_id])
        ]
        self._do([(job, partial(self._attempts.fit, job.id, fits[job.id])) for job in changed])
        turns = queue.next_ones(
            [self._desk.entry(job) for job in ready if fits.get(job.id)],
            [self._desk.entry(job) for job in takes],
            self._desk.capacity,
        )
        taken = {index for job in takes for index in attempts.gpus_of(job.attempt)}
        taken.update(index for gpus in given.values() for index in gpus)
        free = [index for index in range(self._desk.capacity.gpus) if index not in taken]
        chosen: list[tuple[Job, tuple[int, ...]]] = []
        for entry in turns:
            if len(free) < entry.needs.gpus:
                break
            chosen.append((jobs[entry.id], tuple(free[: entry.needs.gpus])))
            del free[: entry.needs.gpus]
        elsewhere = queue.in_order(self._desk.entry(job) for job in ready if job.id not in here)
        return chosen + [(jobs[entry.id], ()) for entry in elsewhere]

    def _do(
        self,
        calls: Iterable[tuple[Job, Callable[[], None]]],
        gpus: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Make these calls, each on a thread of its job's backend, and wait for them, but not for long.

        Args:
            gpus: what jobs are given by their call, by their ids; None: these calls start nothing.
        """
        begun = []
        for job, call in calls:
            if job.id not in self._busy:
                moving = partial(self._move, job, call)
                begun.append(
                    self._submit(job.id, job.spec.backend, moving, None if gpus is None else gpus.get(job.id, ()))
                )
        wait(begun, _PATIENCE_S)

    def _move(self, job: Job, call: Callable[[], None]) -> None:
        """Make a job's call. What fails is held against the place that does not answer, or else against the job."""
        try:
            call()
        except BusyError as error:
            _log.info("%s", error)
        except UnknownJobError:
            _log.info("job %s is not in the record any more", job.id)
        except Exception as error:
            if not self._is_well_for(job, error):
                return
            self._tell(job.id, error)
            # MLflow has its own way with a job: see `Record.doubted`.
            if not isinstance(error, TrackingError):
                self._attempts.failed(job.id, error)
        else:
            self._attempts.succeeded(job.id)
            self._told.pop(job.id, None)

    def _is_well_for(self, job: Job, error: Exception) -> bool:
        """Whether the place that `error` comes from serves others; asked now, and noted."""
        if isinstance(error, TrackingError):
            return self._is_well_at(_MLFLOW)
        if isinstance(error, StorageError):
            return self._is_well_at(_STORAGE)
        if isinstance(error, BackendError):
            # Where it is known to be away, `_probe` asks.
            return job.spec.backend not in self.problems and self._is_well_at(job.spec.backend)
        return True

    def _is_due(self, where: str) -> bool:
        """Whether MLflow or the disk is to be asked now: it did not answer, or has not been asked for a while."""
        asked = self._asked.get(where)
        return where in self.problems or asked is None or time.monotonic() - asked >= _ASK_S

    def _is_well_at(self, where: str) -> bool:
        """Put a small question to MLflow, the disk or a backend; whether it was answered is noted in `problems`."""
        self._asked[where] = time.monotonic()
        with self._noting(where):
            if where == _MLFLOW:
                self._record.ask()
            elif where == _STORAGE:
                self._desk.try_storage()
            else:
                self._desk.backend(where).reconcile()
        return where not in self.problems

    def _tell(self, key: str, error: Exception) -> None:
        # In each round again: said in full once.
        if self._told.get(key) != str(error):
            self._told[key] = str(error)
            _log.warning("%s could not be moved on: %s", key, error, exc_info=not isinstance(error, LorotError))

    def _submit(
        self, key: str, backend: str, call: Callable[[], None], gpus: tuple[int, ...] | None = None
    ) -> "Future[None]":
        def work() -> None:
            try:
                call()
            except Exception as error:
                self._tell(key, error)
            finally:
                with self._calling:
                    self._busy.pop(key, None)
                    self._given.pop(key, None)

        with self._calling:
            if gpus is not None:
                self._given[key] = gpus
            pool = self._pools.get(backend)
            if pool is None:
                pool = self._pools[backend] = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix=f"lorot-{backend}")
            future = self._busy[key] = pool.submit(work)
        return future

    @contextlib.contextmanager
    def _noting(self, where: str) -> Iterator[None]:
        """Keep what goes wrong inside in `problems`, and take it away when all goes well."""
        try:
            yield
        except LorotError as error:
            self._complain(where, error)
        else:
            if self.problems.pop(where, None) is not None:
                _log.warning("%s answers again", where)

    def _complain(self, where: str, error: LorotError) -> None:
        if where not in self.problems:
            _log.warning("%s: %s", where, error)
        self.problems[where] = str(error)

    def _is_ready(self) -> bool:
        """Whether what is open of the record is in memory; it is loaded now if it is not."""
        if not self._is_loaded:
            with self._noting(_MLFLOW):
                self._record.load_open()
                self._is_loaded = True
        return self._is_loaded

    def _probe(self) -> None:
        """Ask backends what they have: each once at the start, and those that do not answer until they do."""
        now = time.monotonic()
        for name in self._unreconciled | (self.problems.keys() & set(traits.NAMES)):
            if now - self._probed.get(name, -_PROBE_S) >= _PROBE_S and f"backend {name}" not in self._busy:
                self._probed[name] = now
                wait([self._submit(f"backend {name}", name, partial(self._look_at, name))], _PATIENCE_S)

    def _look_at(self, name: str) -> None:
        with self._noting(name):
            self._reconcile(name)

    def _reconcile(self, name: str) -> None:
        """Clear away what a backend has of attempts that are over; those that are not are adopted by their jobs."""
        backend = self._desk.backend(name)
        found = backend.reconcile()
        self._unreconciled.discard(name)
        for attempt, job_id in found.items():
            try:
                job = self._record.get(job_id)
            except UnknownJobError:
                _log.warning("%s: %s belongs to no job of this record and is left alone", name, attempt)
                continue
            except TrackingError as error:
                self._unreconciled.add(name)
                self._tell(attempt, error)
                continue
            # One that is not known was begun after a backup that was restored since, and is left alone.
            known = any(one.name == attempt for one in job.attempts) or _is_forgotten(job, attempt)
            is_over = known and (job.has_ended or job.state == "queued" or job.attempt.name != attempt)  # type: ignore[union-attr]
            if is_over:
                try:
                    self._clear_away(backend, attempt, job)
                except Exception as error:
                    # The others are not to wait for it.
                    self._unreconciled.add(name)
                    self._tell(attempt, error)

    def _clear_away(self, backend: Backend, attempt: str, job: Job) -> None:
        if backend.status(attempt, {}).phase in ("waiting", "running"):
            _log.warning("%s runs although its job is %s; it is stopped", attempt, job.state)
            backend.cancel(attempt, {}, job.spec.grace_s)
        else:
            backend.remove(attempt, {})


def _is_forgotten(job: Job, attempt: str) -> bool:
    """Whether an attempt of this name is older than those that are kept of the job."""
    number = attempt.rpartition("-")[2]
    return bool(job.attempts) and number.isdecimal() and int(number) < job.attempts[0].number
