"""One after the other for each job, and no job behind another."""

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """A lock for each job that somebody is at, made when it is needed and forgotten after the last. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # With each the number of those who have it or wait for it.
        self._turns: dict[str, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def of(self, job_id: str) -> Iterator[None]:
        """Nobody else is in a block of this job's meanwhile. Not to be entered twice by one thread."""
        with self._lock:
            turn, count = self._turns.get(job_id, (threading.Lock(), 0))
            self._turns[job_id] = turn, count + 1
        try:
            with turn:
                yield
        finally:
            with self._lock:
                count = self._turns[job_id][1] - 1
                if count:
                    self._turns[job_id] = turn, count
                else:
                    del self._turns[job_id]

    def __len__(self) -> int:
        """How many jobs somebody is at, or waits to be."""
        return len(self._turns)
