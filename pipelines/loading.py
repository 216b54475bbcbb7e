"""Batches for a worker, from either rendering: what training and evaluation open.

Reading runs ahead on threads, rendering runs ahead of what is asked for, and the batches are the same whatever the
number of threads, the depth of the queues, the memory allowed, the world size or the step that loading starts at.
"""

import atexit
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.errors import DataError, LorotError
from pipelines.plan import Plan, take
from pipelines.readahead import Fetch, Readahead
from pipelines.reading import Evaluation, Reader, Sample, Source, Training, Work
from pipelines.soundness import UnsoundError

__all__ = ["Loader", "Source", "open_eval", "open_train"]

# What reading may take, if nobody says otherwise.
READ_THREADS = 64
READAHEAD_MB = 256
READ_TIMEOUT_S = 120.0
# Rows of a manifest that are looked at together.
PIECE = 65_536


class Renderer(Protocol):
    """What `dali.Renderer` and `torch_reference.Renderer` have in common."""

    depth: int

    @property
    def ready(self) -> bool: ...

    def prepare(self, samples: Sequence[Sample], plan: Plan) -> Any: ...

    def submit(self, prepared: Any) -> None: ...

    def collect(self) -> Tensor: ...

    def fault(self, sample: Sample, plan: Plan) -> str | None: ...

    def close(self) -> None: ...


def open_train(
    kind: str,
    source: Source,
    *,
    start_step: int,
    stop_step: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    num_threads: int = 0,
    prefetch: int = 2,
    dtype: str = "float32",
    read_threads: int = READ_THREADS,
    readahead_mb: int = READAHEAD_MB,
    read_timeout_s: float = READ_TIMEOUT_S,
) -> "Loader":
    """This worker's micro-batches of steps start_step to stop_step - 1, accumulation-major inside a step.

    Args:
        kind: "dali"; "stock", DALI with its own operators only; or "torch" for the plain reference.
        num_threads: for decoding; 0: the machine's cores / world_size.
        prefetch: batches rendered ahead, the one that is ready to be taken included.
        dtype: of the images: "float32", "float16", "bfloat16", or "uint8", which is not normalised.
        read_threads: at most so many read at once; as many are started as the storage's latency asks for.
        readahead_mb: encoded samples held and not yet rendered, 10**6 bytes; one batch is always allowed.
        read_timeout_s: a read that takes longer ends the loading.

    Raises:
        LorotError: the global batch is no multiple of world_size * micro_batch, or `kind` or `dtype` does not exist.
    """
    schedule = Training(
        source.sequence, start_step, stop_step, global_batch, micro_batch, rank, world_size, source.repeats
    )
    reading = read_threads, readahead_mb, read_timeout_s
    return _open(kind, source, schedule, micro_batch, world_size, device, num_threads, prefetch, dtype, reading)


def open_eval(
    kind: str,
    source: Source,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    num_threads: int = 0,
    prefetch: int = 2,
    dtype: str = "float32",
    read_threads: int = READ_THREADS,
    readahead_mb: int = READAHEAD_MB,
    read_timeout_s: float = READ_TIMEOUT_S,
) -> "Loader":
    """This worker's share of one pass over all samples; every rank gets as many batches, all of `batch_size`.

    What fills up the last ones has `valid` False. Arguments are those of `open_train`.

    Raises:
        LorotError: `kind` or `dtype` does not exist.
    """
    schedule = Evaluation(source.sequence, batch_size, rank, world_size)
    reading = read_threads, readahead_mb, read_timeout_s
    return _open(kind, source, schedule, batch_size, world_size, device, num_threads, prefetch, dtype, reading)


class Loader:
    """Iterates over batches once; ends its threads when it is exhausted or closed.

    One thread drives the renderer, so that the caller finds its next batch finished; others read ahead of it.

    Attributes:
        skipped: bad samples met so far, id -> where it lies and why it is bad.
        waited_s: how long the caller has waited for batches.
        rendered: batches rendered so far, those not yet asked for included.
    """

    def __init__(
        self,
        reader: Reader,
        renderer: Callable[[int], Renderer],
        *,
        device: str | torch.device,
        num_threads: int,
        prefetch: int,
        read_threads: int = READ_THREADS,
        readahead_mb: float = READAHEAD_MB,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        """`renderer(depth)` makes one that renders `depth` batches ahead."""
        self.skipped: dict[int, str] = {}
        self.waited_s = 0.0
        self.rendered = 0
        self._reader = reader
        self._make_renderer = renderer
        self._device = device
        self._prefetch = prefetch
        self._delivered = 0
        self._rendering: deque[tuple[Fetch, Work]] = deque()
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

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
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

    def __enter__(self) -> "Loader":
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

    def _render_next(self, ahead: Readahead) -> tuple[Batch, dict[int, str]]:
        """The next batch, with the samples skipped for it. Runs on the driving thread, as all below but `_prepare`."""
        while True:
            self._submit_ready(ahead, wait=True)
            try:
                images = self._renderer.collect()
                break
            except UnsoundError as error:
                self._recover(ahead, error)
        fetch, work = self._rendering.popleft()
        self.rendered += 1
        ahead.release(fetch)
        # So that rendering goes on while nobody asks.
        self._submit_ready(ahead, wait=False)
        return _assemble(work, images, self._reader.source.manifest.labels, self._device), work.skipped

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

    def _prepare(self, work: Work) -> Any:
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

    def _reject_some(self, works: list[Work], error: UnsoundError) -> None:
        """Reject what cannot be decoded; raises DataError if all can be."""
        if not sum(self._reject_faulty(work, range(len(work.samples))) for work in works):
            raise DataError(f"rendering failed, though every image of the batch can be decoded: {error}")

    def _reject_faulty(self, work: Work, rows: Iterable[int]) -> int:
        """Reject those of a batch's rows that cannot be decoded; returns how many these are."""
        faults = 0
        for row in rows:
            reason = self._renderer.fault(work.samples[row], take(work.plan, row))
            if reason is not None:
                self._reader.reject(int(work.plan.ids[row]), int(work.plan.epochs[row]), reason)
                faults += 1
        return faults


def _open(
    kind: str,
    source: Source,
    schedule: Training | Evaluation,
    batch_size: int,
    world_size: int,
    device: str | torch.device,
    num_threads: int,
    prefetch: int,
    dtype: str,
    reading: tuple[int, float, float],
) -> Loader:
    num_threads = num_threads or max(1, (os.cpu_count() or 1) // world_size)
    renderer = _renderer(kind, source, isinstance(schedule, Training), batch_size, str(device), num_threads, dtype)
    read_threads, readahead_mb, read_timeout_s = reading
    return Loader(
        Reader(source, schedule),
        renderer,
        device=device,
        num_threads=num_threads,
        prefetch=prefetch,
        read_threads=read_threads,
        readahead_mb=readahead_mb,
        read_timeout_s=read_timeout_s,
    )


def _renderer(
    kind: str, source: Source, training: bool, batch_size: int, device: str, num_threads: int, dtype: str
) -> Callable[[int], Renderer]:
    # Both only where they are used: either takes seconds to import, and DALI is not to be had everywhere.
    if kind == "torch":
        from pipelines import torch_reference

        return lambda depth: torch_reference.Renderer(source.view, source.render_pretext, dtype=dtype)
    if kind not in ("dali", "stock"):
        raise LorotError(f"loader {kind!r} does not exist; there are dali, stock, torch")
    from pipelines import dali

    view, manifest = source.view, source.manifest
    inside = {"random_resized": "inside", "pad": "pads" if training else "whole", "whole": "whole"}
    sizes = source.all_sizes if training else (view.eval_size or view.size,)
    graph = dali.Graph(
        view=view,
        encoded=manifest.encoded,
        window=inside[view.crop],
        resizes=view.crop == "random_resized"
        or len(sizes) > 1
        or not _all_of_size(sizes[0], manifest.heights, manifest.widths),
        flips=training and view.flip,
        rotates=training and source.render_pretext and source.task.num_labels > 0,
        slots=view.slots if training else (),
        dtype=dtype,
    )
    return lambda depth: dali.Renderer(
        graph, device=device, batch_size=batch_size, num_threads=num_threads, depth=depth, stock=kind == "stock"
    )


def _all_of_size(size: int, heights: np.ndarray, widths: np.ndarray) -> bool:
    # A header that could not be read has height and width 0; such an image is never rendered. Piece by piece: where
    # sizes vary the first piece tells, whatever the length; only images that are all of one size are all looked at.
    return all(
        bool(np.all((sides == size) | (sides == 0)))
        for start in range(0, len(heights), PIECE)
        for sides in (heights[start : start + PIECE], widths[start : start + PIECE])
    )


def _assemble(work: Work, images: Tensor, labels: np.ndarray, device: str | torch.device) -> Batch:
    plan = work.plan
    return Batch(
        images=images,
        labels=torch.from_numpy(labels[plan.ids]),
        pretext_labels=torch.from_numpy(plan.pretext_labels),
        boxes=torch.from_numpy(plan.boxes),
        turns=torch.from_numpy(plan.turns),
        ids=torch.from_numpy(plan.ids),
        valid=torch.from_numpy(plan.valid),
    ).to(device)
