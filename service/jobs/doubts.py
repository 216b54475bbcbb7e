"""Jobs that MLflow has refused something of: their runs may have been deleted there. Imports no torch."""

import contextlib
import threading
from collections.abc import Iterator

from service import store
from service.errors import TrackingError


class Doubts:
    """Thread-safe."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def of(self, job_id: str) -> Iterator[None]:
        """Note the job if MLflow, which answers, refuses what is done inside."""
        try:
            yield
        except store.UnreachableError:
            raise
        except TrackingError:
            with self._lock:
                self._ids.add(job_id)
            raise

    def clear(self, job_id: str) -> None:
        """It is well."""
        with self._lock:
            self._ids.discard(job_id)

    def ids(self) -> list[str]:
        """Those that are noted."""
        with self._lock:
            return sorted(self._ids)
