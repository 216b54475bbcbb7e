"""Runs that a server has made of one question: which one stays, and when that is looked at. Imports no torch."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator

from service import run_creation, store
from service.errors import TrackingError
from service.jobs import job_tags
from service.jobs.turns import Turns

_log = logging.getLogger(__name__)

# When a request that was not answered is taken to be served or lost, seconds: twice as long as an answer is waited for.
LATE_S = 120.0


class Twins:
    """The keys that several runs have or may get. Thread-safe."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        # When each is looked at, by the monotonic clock, and which job somebody was told of meanwhile.
        self._late: dict[str, float] = {}
        self._told: dict[str, str] = {}
        self._lock = threading.Lock()
        self._turns = Turns()

    @property
    def are_expected(self) -> bool:
        """Whether there is a key that is still to be looked at."""
        with self._lock:
            return bool(self._late)

    def found(self, key: str) -> None:
        """Several runs have this key; it is looked at next."""
        with self._lock:
            self._late[key] = time.monotonic()

    @contextlib.contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Let nobody look while a run of this key is made. What raises UnreachableError may still make it later."""
        with self._lock:
            if key in self._late:
                self._late[key] = math.inf
        try:
            # A look that is under way would not know yet that somebody is told of the new one.
            with self._turns.of(key):
                yield
        except store.UnreachableError:
            # Whoever's key it is. A refusal leaves no run: MLflow takes back what it has begun before it says so, and
            # of one after a question that was lost `run_creation.create` says that it is not known.
            self._expect(key)
            raise
        finally:
            with self._lock:
                if self._late.get(key) == math.inf:
                    self._late[key] = time.monotonic() + LATE_S

    def made(self, key: str, job_id: str, *, is_alone: bool) -> None:
        """Somebody is told of this job; another run of its key may follow, unless it is alone."""
        if not is_alone:
            self._expect(key)
        with self._lock:
            if key in self._late:
                self._told[key] = job_id

    def look(
        self,
        sort: Callable[[str], run_creation.Sorted],
        ask: Callable[[], None],
        is_over: Callable[[], bool],
    ) -> None:
        """Look at the keys whose time has come.

        Args:
            sort: does it for one of them.
            ask: puts a small question to MLflow, which has refused one; raises TrackingError if it does not answer.
            is_over: asked before each key; once it says so, the rest is left.

        Raises:
            TrackingError: MLflow does not answer.
        """
        with self._lock:
            due = [(key, at_s) for key, at_s in self._late.items() if at_s <= time.monotonic()]
        for key, at_s in due:
            if is_over():
                return
            try:
                refusal = sort(key).refusal
            except store.UnreachableError:
                raise
            except TrackingError as error:
                # One key may be refused; the others are not to wait for it.
                ask()
                refusal = error
            if refusal is not None:
                _log.warning("key %s has several runs, and will be looked at again: %s", key, refusal)
            self._note_look(key, at_s, is_done=refusal is None)

    def sort_out(self, key: str) -> run_creation.Sorted:
        """Which run of this key stays; its twins are deleted. Raises TrackingError."""
        with self._turns.of(key):
            with self._lock:
                told = self._told.get(key, "")
            if told:
                try:
                    run_creation.set_tags(self._uri, told, {job_tags.TOLD: "1"})
                except store.UnreachableError:
                    raise
                except TrackingError as error:
                    _log.warning("job %s: MLflow does not take that somebody knows it: %s", told, error)
            return run_creation.sort_out(self._uri, key, job_tags.rank, told)

    def _note_look(self, key: str, at_s: float, *, is_done: bool) -> None:
        with self._lock:
            # A time that was noted meanwhile stays.
            if self._late.get(key) != at_s:
                return
            if is_done:
                del self._late[key]
                self._told.pop(key, None)
            else:
                self._late[key] = time.monotonic() + LATE_S

    def _expect(self, key: str) -> None:
        with self._lock:
            self._late[key] = time.monotonic() + LATE_S
