"""Batches for a worker, from either rendering: what training and evaluation open.

Reading runs ahead on threads, rendering runs ahead of what is asked for, and the batches are the same whatever the
number of threads, the depth of the queues, the memory allowed, the world size or the step that loading starts at.
"""

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.errors import LorotError
from pipelines.loader import READ_THREADS, READ_TIMEOUT_S, READAHEAD_MB, Loader, Renderer
from pipelines.plan import Plan
from pipelines.reading import Evaluation, Reader, Training, Work
from pipelines.source import Source

__all__ = ["Loader", "Source", "open_eval", "open_train"]

# Rows of a manifest that are looked at together.
PIECE = 65_536


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
) -> Loader[Batch]:
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
) -> Loader[Batch]:
    """This worker's share of one pass over all samples; every rank gets as many batches, all of `batch_size`.

    What fills up the last ones has `valid` False. Arguments are those of `open_train`.

    Raises:
        LorotError: `kind` or `dtype` does not exist.
    """
    schedule = Evaluation(source.sequence, batch_size, rank, world_size)
    reading = read_threads, readahead_mb, read_timeout_s
    return _open(kind, source, schedule, batch_size, world_size, device, num_threads, prefetch, dtype, reading)


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
) -> Loader[Batch]:
    num_threads = num_threads or max(1, (os.cpu_count() or 1) // world_size)
    renderer = _renderer(kind, source, isinstance(schedule, Training), batch_size, str(device), num_threads, dtype)
    read_threads, readahead_mb, read_timeout_s = reading
    return Loader(
        Reader(source, schedule),
        renderer,
        lambda work, images: _assemble(work, images, source.manifest.labels, device),
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

        return lambda depth: torch_reference.renderer(source.view, source.render_pretext, dtype=dtype)
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


def _assemble(work: Work[Plan], images: Tensor, labels: np.ndarray, device: str | torch.device) -> Batch:
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
