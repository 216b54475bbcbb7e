"""Images with the objects in them, for detection and segmentation: what training and evaluation open, and get."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import DataError, LorotError
from pipelines.instance_columns import InstanceTable
from pipelines.instance_plan import InstancePlan, InstanceView, eval_plan, train_plan
from pipelines.loader import READ_THREADS, READ_TIMEOUT_S, READAHEAD_MB, Loader, Renderer
from pipelines.manifest import Manifest
from pipelines.order import Order
from pipelines.reading import Evaluation, Reader, Training, Work
from pipelines.rendered import Rendered
from pipelines.source import Sample, blank

__all__ = ["InstanceBatch", "InstanceSource", "InstanceView", "Instances", "open_eval", "open_train"]


class Instances(NamedTuple):
    """What is known of the K objects of one image, in pixels of the network's input (its content, before padding).

    Attributes:
        boxes: (K, 4) float32 (x_min, y_min, x_max, y_max), half-open.
        labels: (K,) int64 classes from 0 on, without gaps.
        masks: (K, h, w) uint8 0 or 1 over the content; (0, 0, 0) if masks were not asked for.
        crowd: (K,) bool, a group that stands for no single object. Never true in training, where such are left out.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    crowd: Tensor

    def to(self, device: torch.device | str) -> "Instances":
        """The same on `device`; a tensor that is there already is not copied."""
        return Instances(*(tensor.to(device, non_blocking=True) for tensor in self))


class InstanceBatch(NamedTuple):
    """One micro-batch on the device. N is constant over a run, H and W change from batch to batch.

    Attributes:
        images: (N, 3, H, W) float32 normalised, channels_last; each content in the top left corner, zeros elsewhere; H
            and W are the smallest multiples of the view's divisor that hold all contents.
        sizes: (N, 2) int64 (height, width) of the contents.
        source_sizes: (N, 2) int64 of the images on disk, as shown.
        ids: (N,) int64 rows of the manifest.
        valid: (N,) bool, false for what fills up a last batch, which counts nowhere.
        targets: N.
    """

    images: Tensor
    sizes: Tensor
    source_sizes: Tensor
    ids: Tensor
    valid: Tensor
    targets: tuple[Instances, ...]


@dataclass(frozen=True)
class InstanceSource:
    """What is loaded, and how it becomes the network's input; what `source.Source` is to classification.

    Attributes:
        manifest: the images, with their objects.
        view: sizes, flips and normalisation.
        seed: of the order and of everything drawn.
        with_masks: masks come with the boxes; objects without a segmentation are left out then.
        limit: use this many images only, drawn by the seed (in training, from those that have objects).
        on_bad_image: "error", or "skip": in training the next readable image takes its place, in evaluation the image
            counts nowhere.
    """

    manifest: Manifest
    view: InstanceView
    seed: int
    with_masks: bool
    limit: int | None = None
    on_bad_image: str = "error"

    def __post_init__(self) -> None:
        where = f"{self.manifest.name}: split {self.manifest.split!r} in {self.manifest.root}"
        if self.on_bad_image not in ("error", "skip"):
            raise LorotError(f"on_bad_image {self.on_bad_image!r} does not exist; there are error, skip")
        if self.manifest.instances is None:
            raise DataError(f"{where} does not say what is in which box; use a data set of COCO's format: name coco")
        if self.with_masks and not self.manifest.instances.has_segmentations:
            raise DataError(f"{where} has no segmentations; annotate them, or train a detector, which needs boxes only")
        if len(self.manifest) == 0:
            raise DataError(f"{where} has no images")

    @property
    def table(self) -> InstanceTable:
        """The objects of the images."""
        assert self.manifest.instances is not None
        return self.manifest.instances

    @cached_property
    def training_order(self) -> Order:
        """The order of the images that have objects to learn from; raises DataError if none has."""
        count = self.manifest.heading.num_trainable
        count = len(self.manifest) if count is None else count
        if count == 0:
            raise DataError(f"{self.manifest.root}: no image of split {self.manifest.split!r} has an object in it")
        return Order(self.seed, count, self.limit)

    @cached_property
    def evaluation_order(self) -> Order:
        """All images."""
        return Order(self.seed, len(self.manifest), self.limit)

    def plan_training(self, step: int, epochs: np.ndarray, ids: np.ndarray) -> InstancePlan:
        """What becomes of (N,) images in training step `step`."""
        plan = train_plan(self.view, self.seed, epochs, ids, self._sizes(ids), self.table)
        return self._with_segmentations(plan)

    def plan_evaluation(self, ids: np.ndarray, valid: np.ndarray) -> InstancePlan:
        """What becomes of (N,) images in evaluation; in the place of one that is not `valid` stands `blank`."""
        sizes = np.where(valid[:, None], self._sizes(ids), self.view.divisor)
        return self._with_segmentations(eval_plan(self.view, ids, sizes, valid, self.table))

    def blank(self) -> Sample:
        """What is rendered in evaluation in the place of an image that is not there."""
        return blank(self.view.divisor, self.manifest.encoded)

    def _sizes(self, ids: np.ndarray) -> np.ndarray:
        return np.stack([self.manifest.heights[ids], self.manifest.widths[ids]], axis=1)

    def _with_segmentations(self, plan: InstancePlan) -> InstancePlan:
        if self.with_masks:
            for row, own in enumerate(plan.objects):
                plan.objects[row] = own.where(np.array([bool(runs) for runs in own.segmentations], bool))
        return plan


def open_train(
    kind: str,
    source: InstanceSource,
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
    read_threads: int = READ_THREADS,
    readahead_mb: int = READAHEAD_MB,
    read_timeout_s: float = READ_TIMEOUT_S,
) -> Loader[InstanceBatch]:
    """This worker's micro-batches of steps start_step to stop_step - 1, accumulation-major inside a step.

    Images without objects do not come, nor do crowds; a sample's size and flip depend on (seed, epoch, id) only.

    Args:
        kind: "dali", or "torch" for the plain reference. All others: see `loading.open_train`.

    Raises:
        LorotError: the global batch is no multiple of world_size * micro_batch, or `kind` does not exist.
        DataError: no image has an object in it.
    """
    order = source.training_order
    schedule = Training(order, start_step, stop_step, global_batch, micro_batch, rank, world_size)
    reading = read_threads, readahead_mb, read_timeout_s
    return _open(kind, source, schedule, micro_batch, world_size, device, num_threads, prefetch, reading)


def open_eval(
    kind: str,
    source: InstanceSource,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    num_threads: int = 0,
    prefetch: int = 2,
    read_threads: int = READ_THREADS,
    readahead_mb: int = READAHEAD_MB,
    read_timeout_s: float = READ_TIMEOUT_S,
) -> Loader[InstanceBatch]:
    """This worker's share of one pass over all images; every rank gets as many batches, all of `batch_size`.

    Images without objects come too, and crowds are told by `Instances.crowd`. What fills up the last batches has
    `valid` False. Arguments are those of `open_train`.

    Raises:
        LorotError: `kind` does not exist.
    """
    schedule = Evaluation(source.evaluation_order, batch_size, rank, world_size)
    reading = read_threads, readahead_mb, read_timeout_s
    return _open(kind, source, schedule, batch_size, world_size, device, num_threads, prefetch, reading)


def _open(
    kind: str,
    source: InstanceSource,
    schedule: Training | Evaluation,
    batch_size: int,
    world_size: int,
    device: str | torch.device,
    num_threads: int,
    prefetch: int,
    reading: tuple[int, float, float],
) -> Loader[InstanceBatch]:
    num_threads = num_threads or max(1, (os.cpu_count() or 1) // world_size)
    read_threads, readahead_mb, read_timeout_s = reading
    return Loader(
        Reader(source, schedule),
        _renderer(kind, source, isinstance(schedule, Training), batch_size, str(device), num_threads),
        lambda work, rendered: _assemble(work, rendered, device),
        num_threads=num_threads,
        prefetch=prefetch,
        read_threads=read_threads,
        readahead_mb=readahead_mb,
        read_timeout_s=read_timeout_s,
    )


def _renderer(
    kind: str, source: InstanceSource, training: bool, batch_size: int, device: str, num_threads: int
) -> Callable[[int], Renderer]:
    if kind == "torch":
        from pipelines import instance_reference

        return lambda depth: instance_reference.renderer(source.view, source.with_masks)
    if kind != "dali":
        raise LorotError(f"loader {kind!r} does not exist; there are dali, torch")
    from pipelines import dali

    flips = training and source.view.flip
    graph = dali.InstanceGraph(source.view, source.manifest.encoded, flips=flips, masks=source.with_masks)
    return lambda depth: dali.Renderer(
        graph, device=device, batch_size=batch_size, num_threads=num_threads, depth=depth
    )


def _assemble(work: Work[InstancePlan], rendered: Rendered, device: str | torch.device) -> InstanceBatch:
    plan = work.plan
    known = zip(plan.objects, rendered.boxes, rendered.masks, strict=True)
    return InstanceBatch(
        images=rendered.images.to(device, non_blocking=True),
        sizes=torch.from_numpy(plan.sizes).to(device, non_blocking=True),
        source_sizes=torch.from_numpy(plan.source_sizes).to(device, non_blocking=True),
        ids=torch.from_numpy(plan.ids).to(device, non_blocking=True),
        valid=torch.from_numpy(plan.valid).to(device, non_blocking=True),
        targets=tuple(
            # The labels are the manifest's own memory, which nobody may write to.
            Instances(boxes, torch.tensor(own.labels), masks, torch.tensor(own.crowd)).to(device)
            for own, boxes, masks in known
        ),
    )
