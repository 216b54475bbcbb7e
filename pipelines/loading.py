"""Batches for a worker, from either rendering: what training and evaluation open.

Reading runs ahead on threads, rendering runs ahead of what is asked for, and the batches are the same whatever the
number of threads, the depth of the queues, the world size or the step that loading starts at.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines import torch_reference
from pipelines.batch import Batch
from pipelines.errors import DataError, LorotError
from pipelines.plan import Plan, take
from pipelines.reading import Evaluation, Reader, Source, Training, Work
from pipelines.soundness import UnsoundError

__all__ = ["Loader", "Source", "open_eval", "open_train"]


class Renderer(Protocol):
    """What `dali.Renderer` and `torch_reference.Renderer` have in common."""

    depth: int

    @property
    def ready(self) -> bool: ...

    def prepare(self, samples: list[np.ndarray], plan: Plan) -> Any: ...

    def submit(self, prepared: Any) -> None: ...

    def collect(self) -> Tensor: ...

    def fault(self, sample: np.ndarray, plan: Plan) -> str | None: ...

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
) -> "Loader":
    """This worker's micro-batches of steps start_step to stop_step - 1, accumulation-major inside a step.

    Args:
        kind: "dali", or "torch" for the plain reference.
        num_threads: for reading and decoding; 0: the machine's cores / world_size.
        prefetch: batches rendered ahead.

    Raises:
        LorotError: the global batch is no multiple of world_size * micro_batch, or `kind` does not exist.
    """
    schedule = Training(source.order, start_step, stop_step, global_batch, micro_batch, rank, world_size)
    return _open(kind, source, schedule, micro_batch, world_size, device, num_threads, prefetch)


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
) -> "Loader":
    """This worker's share of one pass over all samples; every rank gets as many batches, all of `batch_size`.

    What fills up the last ones has `valid` False.

    Raises:
        LorotError: `kind` does not exist.
    """
    schedule = Evaluation(source.order, batch_size, rank, world_size)
    return _open(kind, source, schedule, batch_size, world_size, device, num_threads, prefetch)


class Loader:
    """Iterates over batches once; ends its threads when it is exhausted or closed.

    One thread drives the renderer, so that the caller finds its next batch finished; others read ahead of it.

    Attributes:
        skipped: bad samples met so far, id -> where it lies and why it is bad.
    """

    def __init__(
        self,
        reader: Reader,
        renderer: Callable[[int], Renderer],
        *,
        device: str | torch.device,
        num_threads: int,
        prefetch: int,
    ) -> None:
        """`renderer(depth)` makes one that renders `depth` batches ahead."""
        self.skipped: dict[int, str] = {}
        self._reader = reader
        self._make_renderer = renderer
        self._device = device
        self._prefetch = prefetch
        self._ahead = max(prefetch, num_threads)
        self._requested = self._rendered = self._delivered = 0
        self._pending: deque[Future[tuple[Work, Any]]] = deque()
        self._rendering: deque[Work] = deque()
        self._closed = len(self) == 0
        if not self._closed:
            self._readers = ThreadPoolExecutor(num_threads, thread_name_prefix="reader")
            self._driver = ThreadPoolExecutor(1, thread_name_prefix="renderer")
            self._renderer = renderer(min(prefetch, len(self)))
            self._read_ahead()
            self._next = self._driver.submit(self._render_next)

    def __len__(self) -> int:
        """Batches in all, those already delivered included."""
        return len(self._reader.schedule)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            batch, skipped = self._next.result()
        except BaseException:
            self.close()
            raise
        self._delivered += 1
        self.skipped.update(skipped)
        if self._delivered == len(self):
            self.close()
        else:
            self._next = self._driver.submit(self._render_next)
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and free the buffers; batches that were handed out stay valid."""
        if self._closed:
            return
        self._closed = True
        self._driver.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._rendering.clear()
        self._renderer.close()

    def _render_next(self) -> tuple[Batch, dict[int, str]]:
        """The next batch, with the samples skipped for it. Runs on the driving thread, as all below but `_prepare`."""
        while True:
            self._submit_ready(wait=True)
            try:
                images = self._renderer.collect()
                break
            except UnsoundError as error:
                self._recover(error)
        work = self._rendering.popleft()
        self._rendered += 1
        # So that rendering goes on while nobody asks.
        self._submit_ready(wait=False)
        return _assemble(work, images, self._reader.source.manifest.labels, self._device), work.skipped

    def _submit_ready(self, wait: bool) -> None:
        """Give the renderer what has been read; wait only if it has nothing else to render, and only with `wait`."""
        while self._pending and len(self._rendering) < self._renderer.depth:
            future = self._pending[0]
            starved = wait and (not self._rendering or not self._renderer.ready)
            # A bad sample is reported when its batch's turn has come.
            if not starved and (not future.done() or future.exception() is not None):
                return
            work, prepared = future.result()
            self._pending.popleft()
            self._renderer.submit(prepared)
            self._rendering.append(work)
            self._read_ahead()

    def _read_ahead(self) -> None:
        while len(self._pending) < self._ahead and self._requested < len(self):
            self._pending.append(self._readers.submit(self._prepare, self._requested))
            self._requested += 1

    def _prepare(self, index: int) -> tuple[Work, Any]:
        while True:
            work = self._reader.load(index)
            try:
                return work, self._renderer.prepare(work.samples, work.plan)
            except UnsoundError as error:
                self._reject_faulty([work], error)

    def _recover(self, error: UnsoundError) -> None:
        """After a sample that passed as sound broke the renderer: find it, and render again what was in the queue."""
        lost = list(self._rendering)
        self._reject_faulty(lost, error)
        self._rendering.clear()
        self._renderer.close()
        self._renderer = self._make_renderer(min(self._prefetch, len(self) - self._rendered))
        again = [self._readers.submit(self._prepare, work.index) for work in lost]
        self._pending.extendleft(reversed(again))

    def _reject_faulty(self, works: list[Work], error: UnsoundError) -> None:
        found = False
        for work in works:
            for row, sample in enumerate(work.samples):
                reason = self._renderer.fault(sample, take(work.plan, row))
                if reason is not None:
                    self._reader.reject(int(work.plan.ids[row]), reason)
                    found = True
        if not found:
            raise DataError(f"rendering failed, though every image of the batch can be decoded: {error}")


def _open(
    kind: str,
    source: Source,
    schedule: Training | Evaluation,
    batch_size: int,
    world_size: int,
    device: str | torch.device,
    num_threads: int,
    prefetch: int,
) -> Loader:
    num_threads = num_threads or max(1, (os.cpu_count() or 1) // world_size)
    renderer = _renderer(kind, source, isinstance(schedule, Training), batch_size, str(device), num_threads)
    return Loader(Reader(source, schedule), renderer, device=device, num_threads=num_threads, prefetch=prefetch)


def _renderer(
    kind: str, source: Source, training: bool, batch_size: int, device: str, num_threads: int
) -> Callable[[int], Renderer]:
    if kind == "torch":
        return lambda depth: torch_reference.Renderer(source.view, source.render_pretext)
    if kind != "dali":
        raise LorotError(f"loader {kind!r} does not exist; there are dali, torch")
    # Only here: DALI takes a second to import and is not to be had everywhere.
    from pipelines import dali

    view, manifest = source.view, source.manifest
    inside = {"random_resized": "inside", "pad": "pads" if training else "whole", "whole": "whole"}
    graph = dali.Graph(
        view=view,
        encoded=manifest.encoded,
        window=inside[view.crop],
        resizes=view.crop == "random_resized" or not _all_of_size(view.size, manifest.heights, manifest.widths),
        flips=training and view.flip,
        rotates=training and source.render_pretext and source.task.num_labels > 0,
    )
    return lambda depth: dali.Renderer(
        graph, device=device, batch_size=batch_size, num_threads=num_threads, depth=depth
    )


def _all_of_size(size: int, heights: np.ndarray, widths: np.ndarray) -> bool:
    # A header that could not be read has height and width 0; such an image is never rendered.
    return bool(np.all((heights == size) | (heights == 0)) and np.all((widths == size) | (widths == 0)))


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
