"""One pass of a classifier over images with boxes: every image's class activation map becomes boxes and counts."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.batch import Batch
from pipelines.manifest import Manifest
from pipelines.plan import View, eval_plan
from service.downstream import boxes, cam
from service.downstream.scores import CAM_THRESHOLDS, CENTRE_SHARES, Scores, Tally
from service.errors import DataError
from service.models import Classifier

NUM_SIGHTINGS = 12


def check(manifest: Manifest, classes: tuple[str, ...], model: str) -> None:
    """Whether the model's answers mean something on this data; raises DataError otherwise."""
    where = f"{manifest.name} {manifest.split} in {manifest.root}"
    if not manifest.has_boxes:
        raise DataError(f"{where}: has no boxes to compare with; localization needs a data set with boxes, as demo")
    if len(manifest.classes) != len(classes):
        raise DataError(
            f"{where}: has {len(manifest.classes)} classes, {model} knows {len(classes)}; use what it was trained on"
        )
    for label, (ours, its) in enumerate(zip(manifest.classes, classes, strict=True)):
        if ours != its:
            raise DataError(f"{where}: class {label} is {ours!r}, but {its!r} to {model}; use what it was trained on")


@dataclass(frozen=True)
class Sighting:
    """One image kept for the pictures.

    Attributes:
        id, label, predicted: its row in the manifest, its class and the model's answer.
        image: (3, S, S), what the network saw.
        heat: (S, S) 0..1, the map of the predicted class: what one gets without knowing the true one.
        window: (4,) of the plan. truth: (M, 4) true boxes in source pixels.
    """

    id: int
    label: int
    predicted: int
    image: np.ndarray
    heat: np.ndarray
    window: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class Measured:
    """The outcome of one pass over the data; `sightings` are spread evenly over it."""

    scores: Scores
    sightings: tuple[Sighting, ...]
    inference_s: float
    boxes_s: float


@torch.inference_mode()
def measure(
    model: Classifier,
    manifest: Manifest,
    view: View,
    batches: Iterable[Batch],
    total: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> Measured:
    """One pass over `batches`, which hold `total` valid images; memory does not grow with their number.

    Args:
        model: in eval mode, on the batches' device.
        advance: is told how many more images are done.
    """
    tally, sightings, inference_s, boxes_s = Tally(), [], 0.0, 0.0
    shown = set(np.linspace(0, total - 1, min(NUM_SIGHTINGS, total)).astype(int).tolist())
    fc = model.fc
    for batch in batches:
        start = time.perf_counter()
        features = model.features(batch.images)
        logits = fc(features.mean(dim=(2, 3)))
        ranked = logits.topk(min(5, fc.out_features)).indices.cpu().numpy()
        middle = time.perf_counter()

        valid = batch.valid.cpu().numpy()
        ids, labels, ranked = batch.ids.cpu().numpy()[valid], batch.labels.cpu().numpy()[valid], ranked[valid]
        maps = cam.class_activation_maps(features, fc.weight, batch.labels)
        heat = cam.heatmaps(maps, view.size).cpu().numpy()[valid]
        truths = [manifest.boxes(sample) for sample in ids]
        heights, widths = manifest.heights[ids], manifest.widths[ids]
        windows = eval_plan(view, ids, heights, widths, valid[valid]).windows
        found = boxes.to_source(boxes.largest_component_boxes(heat, CAM_THRESHOLDS), windows, view.size)
        tally.add(
            top1=ranked[:, 0] == labels,
            top5=(ranked == labels[:, None]).any(axis=1),
            located=np.array([len(truth) > 0 for truth in truths], bool),
            cam_iou=boxes.best_iou(found, truths),
            centre_iou=boxes.best_iou(boxes.centre_boxes(heights, widths, CENTRE_SHARES), truths),
        )
        boxes_s += time.perf_counter() - middle
        inference_s += middle - start

        first = tally.num_images - len(ids)
        for row in range(len(ids)):
            if first + row in shown:
                at = int(np.flatnonzero(valid)[row])
                predicted = int(ranked[row, 0])
                one = cam.class_activation_maps(
                    features[at : at + 1], fc.weight, torch.tensor([predicted]).to(fc.weight.device)
                )
                sightings.append(
                    Sighting(
                        id=int(ids[row]),
                        label=int(labels[row]),
                        predicted=predicted,
                        image=batch.images[at].float().cpu().numpy(),
                        heat=cam.heatmaps(one, view.size)[0].cpu().numpy(),
                        window=windows[row],
                        truth=truths[row],
                    )
                )
        advance(len(ids))
    return Measured(tally.scores(), tuple(sightings), inference_s, boxes_s)
