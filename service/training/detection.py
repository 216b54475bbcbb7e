"""Training a detector on a registered classifier: RetinaNet for boxes, SOLOv2 for masks.

A detector divides its losses by what it finds to learn in a micro-batch (objects, anchors on them), so the mean over a
step's micro-batches is another number when they are cut otherwise. The cut into micro-batches is therefore part of what
is trained, as it is with BatchNorm: `micro_batch` defines the result, the number of workers that share them does not.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import instances, run_lengths
from pipelines.instances import InstanceBatch, InstanceSource, InstanceView
from pipelines.manifest import Manifest
from service import detection_config, lineage, pictures
from service.config import DetectionConfig
from service.downstream.coco_scores import Scorer
from service.errors import CheckpointError, ConfigError, DataError
from service.models import detectors
from service.models.detectors import Detections, SoftMasks
from service.run_folder import RunFolder
from service.tracking import Run
from service.training import backbone, detection_results, distributed, feeding
from service.training.backbone import Backbone
from service.training.console import Display
from service.training.distributed import World
from service.training.engine import Engine
from service.training.engine_settings import is_channels_last
from service.training.lengths import Lengths
from service.training.meters import Meters
from service.training.starting_point import shared_facts
from service.training.task import Batches

# How a job's findings are compared with the truth.
_OVERLAP = {"detect": "bbox", "segment": "segm"}


def learn(config: DetectionConfig, engine: Engine, batch: InstanceBatch, meters: Meters) -> Tensor:
    """The detector's loss of one micro-batch, as its module defines it."""
    images = _laid_out(config, engine.world, batch.images)
    losses: dict[str, Tensor] = engine(images, batch.sizes, batch.targets)
    meters.add(losses, batch.valid.sum())
    return losses["loss"]


def open_task(
    config: DetectionConfig, folder: RunFolder, world: World, train_set: Manifest, eval_set: Manifest
) -> "Detection":
    """The task of a detector's job.

    Raises:
        ConfigError: the splits do not have the same classes, or hold the same images under two names; the run is too
            short for its schedule.
        DataError: they do not say what is where.
        CheckpointError: as `backbone.take`.
    """
    if train_set.classes != eval_set.classes:
        raise ConfigError(
            f"data.eval_split: {config.data.eval_split!r} has {len(eval_set.classes)} classes, "
            f"{config.data.train_split!r} has {len(train_set.classes)}, or they are named differently"
        )
    if train_set.digest == eval_set.digest and config.data.train_split != config.data.eval_split:
        raise ConfigError(
            f"data.eval_split: {config.data.eval_split!r} holds the very images of {config.data.train_split!r}, so the "
            "result would be that of what was learnt; write {split} in data.options.annotations and "
            "data.options.images, as annotations=labels/{split}.json, or "
            f"data.eval_split={config.data.train_split} to mean it"
        )
    task = Detection(config, world, train_set, eval_set, backbone.take(config, folder, world))
    lengths = Lengths.of(config, task.num_samples)
    detection_config.check_schedule(config, lengths.total, lengths.samples)
    return task


class Detection:
    """A detector over the trunk of a registered classifier."""

    def __init__(
        self, job: DetectionConfig, world: World, train_set: Manifest, eval_set: Manifest, stands_on: Backbone
    ) -> None:
        self._job, self._world, self._backbone = job, world, stands_on
        self._train_set, self._eval_set = train_set, eval_set
        # Normalised as the backbone knows its images.
        known = stands_on.card.view
        view = InstanceView(
            short_sides=job.data.short_sides,
            long_side=job.data.long_side,
            flip=job.data.flip,
            mean=tuple(known["mean"]),
            std=tuple(known["std"]),
        )
        self._view, bad = view, job.data.on_bad_image
        with_masks = job.job == "segment"
        self._train_source = InstanceSource(train_set, view, job.seed, with_masks, job.data.train_limit, bad)
        # The truth of an evaluation is the annotations' own, not what was resized with the image.
        self._eval_source = InstanceSource(eval_set, view, job.seed, False, None, bad)
        self._options = feeding.loader_options(job, world)

    @property
    def num_samples(self) -> int:
        return len(self._train_source.training_order)

    def build(self) -> nn.Module:
        trunk = self._backbone.classifier()
        name, options = self._job.model.name, self._job.model.options
        try:
            return detectors.build(name, trunk, len(self._train_set.classes), **options)
        except CheckpointError as error:
            raise CheckpointError(f"{self._backbone.resolved.uri}: no backbone for {name}: {error}") from None

    def start(self, model: nn.Module) -> str:
        card = self._backbone.card
        return f"{self._job.model.name} on {card.model['name']} from {self._backbone.resolved.uri}"

    def facts(self, lengths: Lengths) -> dict[str, Any]:
        return shared_facts(self._job, lengths, self._train_set, self._eval_set) | {
            "job": self._job.job,
            "model.name": self._job.model.name,
            "model.options": self._job.model.options,
            "model.backbone": self._backbone.card.weights_sha256,
            "data.short_sides": list(self._view.short_sides),
            "data.long_side": self._view.long_side,
            "data.flip": self._view.flip,
        }

    def tags(self) -> dict[str, Any]:
        digest = lineage.split_digest(self._train_set.digest, self._eval_set.digest)
        found = lineage.run_tags(self._backbone.resolved, self._job.job, config_digest=self._job.digest)
        return found | {lineage.DATA: digest}

    def meters(self) -> Meters:
        names = detectors.loss_names(self._job.model.name)
        world = self._world
        return Meters(0, names, device=world.device, rank=world.rank, world_size=world.size)

    def open_train(self, first_step: int, stop_step: int) -> AbstractContextManager[Batches]:
        return instances.open_train(
            self._job.data.loader,
            self._train_source,
            start_step=first_step,
            stop_step=stop_step,
            global_batch=self._job.global_batch,
            micro_batch=self._job.micro_batch,
            **self._options,
        )

    def open_eval(self) -> AbstractContextManager[Batches]:
        batch_size = self._job.micro_batch
        return instances.open_eval(self._job.data.loader, self._eval_source, batch_size=batch_size, **self._options)

    @torch.no_grad()
    def evaluate(
        self,
        network: Callable[..., Any],
        batches: Iterator[InstanceBatch],
        asked_to_stop: Callable[[], bool],
        together: Callable[[str], AbstractContextManager[None]],
    ) -> dict[str, float] | None:
        scorer = Scorer(self._eval_set, _OVERLAP[self._job.job])
        began, count = time.perf_counter(), 0
        for batch in batches:
            if asked_to_stop():
                return None
            found: list[Detections] = network(_laid_out(self._job, self._world, batch.images), batch.sizes)
            known = (batch.ids, batch.sizes, batch.source_sizes, batch.valid)
            for one, sample, size, source_size, valid in zip(found, *(part.tolist() for part in known), strict=True):
                if valid:
                    count += 1
                    boxes = boxes_in_source(one.boxes, size, source_size)
                    runs = None if one.soft is None else runs_in_source(one.soft, size, source_size)
                    scorer.update(sample, boxes, one.scores.float(), one.labels, runs)
        seconds = time.perf_counter() - began
        return self._scores(scorer, count, seconds, together)

    def show(self, batch: InstanceBatch, path: Path) -> None:
        pixels = batch.images.float().cpu().contiguous().numpy()
        sheets = pictures.denormalise(pixels, self._view.mean, self._view.std)
        photos = [photo[:height, :width] for photo, (height, width) in zip(sheets, batch.sizes.tolist(), strict=True)]
        pictures.write_objects(photos, [target.boxes.cpu().numpy() for target in batch.targets], path)

    def leave(
        self,
        run: Run,
        folder: RunFolder,
        weights: Mapping[str, Tensor],
        metrics: Mapping[str, float],
        done: Mapping[str, Any],
        display: Display,
    ) -> None:
        splits = self._train_set, self._eval_set
        detection_results.finish(self._job, folder, run, self._backbone, splits, weights, metrics, done, display)

    def _scores(
        self, scorer: Scorer, count: int, seconds: float, together: Callable[[str], AbstractContextManager[None]]
    ) -> dict[str, float]:
        """All workers' findings scored together by the main one, which tells the others."""
        device = self._world.device
        parts = distributed.to_main(scorer.state(), device)
        told: list[str] = []

        def score() -> None:
            whole = Scorer(self._eval_set, _OVERLAP[self._job.job])
            for part in parts:
                whole.merge(part)
            if not len(whole):
                raise DataError(f"{self._eval_set.root}: no image of split {self._eval_set.split!r} can be read")
            # Of what has no objects nothing can be said.
            told.append(json.dumps({name: value for name, value in whole.compute().items() if math.isfinite(value)}))

        # Minutes for a large set: longer than the others may wait in a collective operation.
        distributed.on_main(self._world, score, together("scoring what was found"))
        metrics: dict[str, float] = json.loads(distributed.from_main(told[0] if told else "", device))
        total = distributed.all_sum(torch.tensor(count, dtype=torch.float64, device=device))
        return metrics | {"images_per_s": float(total) / distributed.all_max(seconds, device)}


def _laid_out(config: DetectionConfig, world: World, images: Tensor) -> Tensor:
    return images if is_channels_last(config, world.device) else images.contiguous()


def boxes_in_source(boxes: Tensor, size: tuple[int, int], source_size: tuple[int, int]) -> Tensor:
    """(k, 4) boxes in pixels of the image on disk, on the CPU.

    Args:
        boxes: (k, 4) in pixels of the input's content.
        size, source_size: (height, width) of the content, and of the image on disk.
    """
    height, width = size
    scale = torch.tensor([source_size[1] / width, source_size[0] / height] * 2, dtype=torch.float32)
    return boxes.float().cpu() * scale


def runs_in_source(masks: SoftMasks, size: tuple[int, int], source_size: tuple[int, int]) -> list[bytes]:
    """Run lengths of masks over the image on disk.

    One mask after the other: at the size of a photograph a hundred of them are gigabytes.

    Args:
        masks: of the input.
        size, source_size: (height, width) of the content, and of the image on disk.
    """
    runs: list[bytes] = []
    for number in range(len(masks)):
        mask = masks.drawn(number, size, source_size)
        runs += run_lengths.encode(mask[None].cpu().numpy())
    return runs
