"""Batches in their order, read and rendered ahead of whoever asks for them; what is in them is no concern of it."""

import atexit
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from pipelines.errors import DataError
from pipelines.plan import take
from pipelines.readahead import Fetch, Readahead
from pipelines.reading import Reader, Sample, Work
from pipelines.soundness import UnsoundError

# What reading may take, if nobody says otherwise.
READ_THREADS = 64
READAHEAD_MB = 256
READ_TIMEOUT_S = 120.0

B = TypeVar("B")


class Renderer(Protocol):
    """What `dali.Renderer` and those of the torch references have in common; a plan is one of its own kind."""

    depth: int

    @property
    def ready(self) -> bool: ...

    def prepare(self, samples: Sequence[Sample], plan: Any) -> Any: ...

    def submit(self, prepared: Any) -> None: ...

    def collect(self) -> Any: ...

    def fault(self, sample: Sample, plan: Any) -> str | None: ...

    def close(self) -> None: ...


class Loader(Generic[B]):
    """Iterates over batches once; ends its threads when it is exhausted or closed.

    One thread drives the renderer, so that the caller finds its next batch finished; others read ahead of it.

    Attributes:
        skipped: bad samples met so far, id -> where it lies and why it is bad.
        waited_s: how long the caller has waited for batches.
        rendered: batches rendered so far, those not yet asked for included.
    """

    def __init__(
        self,
        reader: Reader[Any],
        renderer: Callable[[int], Renderer],
        assemble: Callable[[Work[Any], Any], B],
        *,
        num_threads: int,
        prefetch: int,
        read_threads: int = READ_THREADS,
        readahead_mb: float = READAHEAD_MB,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        """A loader of what `reader` reads.

        Args:
            renderer: `renderer(depth)` makes one that renders `depth` batches ahead.
            assemble: makes a batch of what was planned and what was rendered.
        """
        self.skipped: dict[int, str] = {}
        self.waited_s = 0.0
        self.rendered = 0
        self._reader = reader
        self._make_renderer = renderer
        self._assemble = assemble
        self._prefetch = prefetch
        self._delivered = 0
        self._rendering: deque[tuple[Fetch, Work[Any]]] = deque()
        self._ahead: Readahead | None = None
        self._closed = len(self) == 0
        if not self._closed:
            self._renderer = renderer(self._depth())
            self._ahead = Readahead(
                reader,
                self._prepare,
                depth=max(prefetch, num_threads),
                read_threads=read_threads,
                prepare_threads=num_threads,
                limit_bytes=int(readahead_mb * 10**6),
                timeout_s=read_timeout_s,
            )
            self._ahead.fill()
            # Left open and forgotten, its threads would still be at work in compiled code while the interpreter goes,
            # which ends such threads by force; C++ then ends the process ("terminate called ...").
            atexit.register(self.close)
            self._driver = ThreadPoolExecutor(1, thread_name_prefix="renderer")
            self._next = self._driver.submit(self._render_next, self._ahead)

    def __len__(self) -> int:
        """Batches in all, those already delivered included."""
        return len(self._reader.schedule)

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        if self._closed or self._ahead is None:
            raise StopIteration
        began = time.perf_counter()
        try:
            batch, skipped = self._next.result()
        except BaseException:
            self.close()
            raise
        self.waited_s += time.perf_counter() - began
        self._delivered += 1
        self.skipped.update(skipped)
        if self._delivered == len(self):
            self.close()
        else:
            self._next = self._driver.submit(self._render_next, self._ahead)
        return batch

    def __enter__(self) -> "Loader[B]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def read_wait_s(self) -> float:
        """How long rendering has waited for batches to be read and prepared."""
        return self._ahead.wait_s if self._ahead is not None else 0.0

    @property
    def peak_read_bytes(self) -> int:
        """The most encoded bytes that were held and not yet rendered."""
        return self._ahead.peak_bytes if self._ahead is not None else 0

    @property
    def num_read_threads(self) -> int:
        """Reading threads started so far."""
        return self._ahead.num_threads if self._ahead is not None else 0

    def close(self) -> None:
        """End the threads and free the buffers; batches that were handed out stay valid."""
        if self._closed or self._ahead is None:
            return
        self._closed = True
        # First, so that the driver does not wait for what never comes.
        self._ahead.stop()
        self._driver.shutdown(wait=True, cancel_futures=True)
        self._ahead.close()
        self._rendering.clear()
        self._renderer.close()
        atexit.unregister(self.close)

    def _render_next(self, ahead: Readahead) -> tuple[B, dict[int, str]]:
        """The next batch, with the samples skipped for it. Runs on the driving thread, as all below but `_prepare`."""
        while True:
            self._submit_ready(ahead, wait=True)
            try:
                rendered = self._renderer.collect()
                break
            except UnsoundError as error:
                self._recover(ahead, error)
        fetch, work = self._rendering.popleft()
        self.rendered += 1
        ahead.release(fetch)
        # So that rendering goes on while nobody asks.
        self._submit_ready(ahead, wait=False)
        return self._assemble(work, rendered), work.skipped

    def _submit_ready(self, ahead: Readahead, wait: bool) -> None:
        """Give the renderer what has been read; wait only if it has nothing else to render, and only with `wait`."""
        while len(self._rendering) < self._renderer.depth and self.rendered + len(self._rendering) < len(self):
            starved = wait and (not self._rendering or not self._renderer.ready)
            taken = ahead.take(wait=starved)
            if taken is not None:
                fetch, work, prepared = taken
                self._renderer.submit(prepared)
                self._rendering.append((fetch, work))
            elif starved:
                # It starts with `depth` batches at once, of which memory allows only those that it has.
                self._shorten()
            else:
                return

    def _prepare(self, work: Work[Any]) -> Any:
        """What the renderer takes, or None if a sample turned out to be bad and was rejected."""
        # What a decoder has failed at before is tried alone: failing in the queue costs all that is in it.
        if self._reject_faulty(work, self._reader.suspects(work.plan)):
            return None
        try:
            return self._renderer.prepare(work.samples, work.plan)
        except UnsoundError as error:
            self._reject_some([work], error)
            return None

    def _depth(self) -> int:
        """Batches for the renderer to have at work: one more is finished and waits for the caller."""
        return min(max(1, self._prefetch - 1), len(self) - self.rendered)

    def _shorten(self) -> None:
        """Make the renderer one that renders no more batches at once than are in the queue."""
        self._renderer.close()
        self._renderer = self._make_renderer(len(self._rendering))
        for _, work in self._rendering:
            self._renderer.submit(self._renderer.prepare(work.samples, work.plan))

    def _recover(self, ahead: Readahead, error: UnsoundError) -> None:
        """After a sample that passed as sound broke the renderer: find it, and render again what was in the queue."""
        lost = list(self._rendering)
        self._reject_some([work for _, work in lost], error)
        self._rendering.clear()
        self._renderer.close()
        self._renderer = self._make_renderer(self._depth())
        ahead.again([fetch for fetch, _ in lost])

    def _reject_some(self, works: list[Work[Any]], error: UnsoundError) -> None:
        """Reject what cannot be decoded; raises DataError if all can be."""
        if not sum(self._reject_faulty(work, range(len(work.samples))) for work in works):
            raise DataError(f"rendering failed, though every image of the batch can be decoded: {error}")

    def _reject_faulty(self, work: Work[Any], rows: Iterable[int]) -> int:
        """Reject those of a batch's rows that cannot be decoded; returns how many these are."""
        faults = 0
        for row in rows:
            reason = self._renderer.fault(work.samples[row], take(work.plan, row))
            if reason is not None:
                self._reader.reject(int(work.plan.ids[row]), int(work.plan.epochs[row]), reason)
                faults += 1
        return faults
