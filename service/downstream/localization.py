"""One pass of a classifier over images with boxes: every image's class activation map becomes boxes and counts.

Only coarse maps leave the network's device. A thread turns them into boxes beside the network's next batch; it works
in compiled code that lets go of Python's lock, so that the pass takes about as long as the network alone.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.batch import Batch
from pipelines.manifest import Manifest
from pipelines.plan import View, eval_plan
from service.downstream import cam
from service.downstream.protocol import PAPER, Protocol
from service.downstream.scores import CAM_THRESHOLDS, CENTRE_SHARES, Scores, Tally
from service.downstream.subject import check_classes
from service.errors import DataError
from service.models import Classifier

NUM_SIGHTINGS = 12
# Batches whose boxes may be outstanding: what is held does not grow if the network is the faster of the two.
_MOST_PENDING = 2


def check(manifest: Manifest, classes: tuple[str, ...], model: str) -> None:
    """Whether the model's answers mean something on this data; raises DataError otherwise."""
    where = f"{manifest.name} {manifest.split} in {manifest.root}"
    if not manifest.has_boxes:
        raise DataError(f"{where}: has no boxes to compare with; localization needs a data set with boxes, as demo")
    check_classes(manifest, classes, model)


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
    """The outcome of one pass over the data; `sightings` are spread evenly over it.

    Attributes:
        inference_s: the network, its answers and the coarse maps. boxes_s: boxes and counts, beside it on a thread.
        waited_s: what the network has waited for that thread, and the rest that was to do after its last batch.
    """

    scores: Scores
    sightings: tuple[Sighting, ...]
    inference_s: float
    boxes_s: float
    waited_s: float


@dataclass(frozen=True)
class _Seen:
    """What is left of N valid images of a batch after the network: arrays of (N, ...) in the host's memory."""

    ids: np.ndarray
    labels: np.ndarray
    ranked: np.ndarray
    maps: np.ndarray


@torch.inference_mode()
def measure(
    model: Classifier,
    manifest: Manifest,
    view: View,
    batches: Iterable[Batch],
    total: int,
    advance: Callable[[int], Any] = lambda count: None,
    protocol: Protocol = PAPER,
) -> Measured:
    """One pass over `batches`, which hold `total` valid images; memory does not grow with their number.

    Args:
        model: in eval mode, on the batches' device.
        advance: is told how many more images are done.
        protocol: how maps become boxes.
    """
    tally, sightings, inference_s, boxes_s, waited_s = Tally(), [], 0.0, 0.0, 0.0
    shown = set(np.linspace(0, total - 1, min(NUM_SIGHTINGS, total)).astype(int).tolist())
    pending: deque[Future[float]] = deque()
    fc, passed = model.fc, 0
    with ThreadPoolExecutor(1, thread_name_prefix="boxes") as beside:
        # Compiled code is fetched, or made, while the first batches are loaded.
        pending.append(beside.submit(_warm_up, protocol, view.size))
        for batch in batches:
            start = time.perf_counter()
            features = model.features(batch.images)
            logits = fc(features.mean(dim=(2, 3)))
            ranked = logits.topk(min(5, fc.out_features)).indices.cpu().numpy()
            maps = protocol.maps(cam.class_activation_maps(features, fc.weight, batch.labels)).cpu().numpy()
            valid = batch.valid.cpu().numpy()
            ids, labels = batch.ids.cpu().numpy()[valid], batch.labels.cpu().numpy()[valid]
            seen = _Seen(ids, labels, ranked[valid], maps[valid])
            middle = time.perf_counter()
            inference_s += middle - start
            while len(pending) >= _MOST_PENDING:
                boxes_s += pending.popleft().result()
            waited_s += time.perf_counter() - middle
            pending.append(beside.submit(_count, tally, seen, manifest, view, protocol))
            for row in range(len(ids)):
                if passed + row in shown:
                    at = int(np.flatnonzero(valid)[row])
                    sightings.append(_sight(model, manifest, view, protocol, batch, features, seen, row, at))
            passed += len(ids)
            advance(len(ids))
        middle = time.perf_counter()
        while pending:
            boxes_s += pending.popleft().result()
        waited_s += time.perf_counter() - middle
    return Measured(tally.scores(), tuple(sightings), inference_s, boxes_s, waited_s)


def _warm_up(protocol: Protocol, size: int) -> float:
    protocol.boxes(np.eye(2, dtype=np.float32)[None], size, CAM_THRESHOLDS)
    return 0.0


def _count(tally: Tally, seen: _Seen, manifest: Manifest, view: View, protocol: Protocol) -> float:
    """Find the boxes of a batch and count what they are worth; returns how many seconds that took."""
    start = time.perf_counter()
    heights, widths = manifest.heights[seen.ids], manifest.widths[seen.ids]
    windows = eval_plan(view, seen.ids, heights, widths, np.ones(len(seen.ids), bool)).windows
    truths = [manifest.boxes(sample) for sample in seen.ids]
    found = protocol.boxes(seen.maps, view.size, CAM_THRESHOLDS)
    right = seen.ranked == seen.labels[:, None]
    tally.add(
        top1=right[:, 0],
        top5=right.any(axis=1),
        located=np.array([len(truth) > 0 for truth in truths], bool),
        cam_iou=protocol.overlap(found, truths, windows, view.size),
        centre_iou=protocol.centre_overlap(CENTRE_SHARES, heights, widths, truths, windows, view.size),
    )
    return time.perf_counter() - start


def _sight(
    model: Classifier,
    manifest: Manifest,
    view: View,
    protocol: Protocol,
    batch: Batch,
    features: torch.Tensor,
    seen: _Seen,
    row: int,
    at: int,
) -> Sighting:
    """Keep image `row` of the valid ones, `at` of all in the batch."""
    sample, predicted = int(seen.ids[row]), int(seen.ranked[row, 0])
    one = torch.tensor([predicted], device=model.fc.weight.device)
    maps = protocol.maps(cam.class_activation_maps(features[at : at + 1], model.fc.weight, one))
    height, width = manifest.heights[[sample]], manifest.widths[[sample]]
    return Sighting(
        id=sample,
        label=int(seen.labels[row]),
        predicted=predicted,
        # A copy: as a view it would keep its whole batch.
        image=np.array(batch.images[at].float().cpu().numpy()),
        heat=protocol.heatmaps(maps, view.size)[0].cpu().numpy(),
        window=eval_plan(view, np.array([sample]), height, width, np.ones(1, bool)).windows[0],
        truth=manifest.boxes(sample),
    )
