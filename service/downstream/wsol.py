"""Weakly supervised object localization: boxes from a classifier's class activation maps. Table 9 of the LoRot paper.

The table's thresholds 0.5 to 0.9 can be read in two ways, and the paper does not say which is meant: as thresholds on
the map at a fixed IoU of 0.5 (`axis="cam"`), or as thresholds on the IoU. The whole grid is computed, both are given.
How a map becomes a box is another matter that publications differ in: see `protocol`.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines import loading, pretext
from pipelines.manifest import Manifest
from pipelines.plan import View
from pipelines.progress import bar
from pipelines.reading import Source
from service import bundle, provenance, recovery, registry
from service.config import TrackingConfig
from service.downstream import boxes, overlays
from service.downstream.localization import Measured, check, measure
from service.downstream.protocol import PAPER, Protocol, choose
from service.downstream.scores import (
    CAM_THRESHOLDS,
    CENTRE_SHARES,
    IOU_THRESHOLDS,
    READ_THRESHOLDS,
    ZHOU_CAM_THRESHOLD,
    Axis,
    Scores,
)
from service.downstream.subject import Subject, load, open_data
from service.downstream.wsol_table import render, show
from service.errors import ConfigError, StorageError
from service.pictures import denormalise

# What becomes tags of the model version.
HEADLINE = ("top1", "top1_loc@0.5", "gt_known@0.5", "max_box_acc_v2", "centre_box@0.5")


@dataclass(frozen=True)
class Example:
    """One image for the report; the predicted class's map, which is what one gets without knowing the answer.

    Attributes:
        id: row of the manifest.
        label, predicted: class names.
        iou: of `found_box` with the true box that fits best.
        true_boxes, found_box: (x_min, y_min, x_max, y_max) in pixels of the network's input.
        picture: PNG of the map over the photograph, without boxes, relative to the result's folder.
    """

    id: int
    label: str
    predicted: str
    iou: float
    true_boxes: tuple[tuple[float, ...], ...]
    found_box: tuple[float, ...]
    picture: str


@dataclass(frozen=True)
class Result:
    """Everything that was measured.

    Attributes:
        model, version, run_id, model_uri: which model, and the run that trained it; None if a plain file.
        data, split, digest: which images.
        axis: the reading that comes first.
        protocol, component: how maps became boxes: "paper" or "official", "pixels" or "contours".
        view_size: side of the network's input, pixels.
        settings: all that the numbers follow from, besides the weights and the images.
        scores: the numbers themselves.
        wall_s, inference_s: the whole job; the network and its maps. boxes_s: boxes and their scores, on a thread
            beside it. waited_s: what the network waited for that thread.
        examples: a few images, evenly spread over the data set.
        folder: where `wsol.json`, `cam.png` and the examples' pictures lie.
        record_id: the MLflow run of this job. notice: what could not be recorded yet, for the user; else empty.
    """

    model: str
    version: int | None
    run_id: str | None
    model_uri: str
    data: str
    split: str
    digest: str
    axis: Axis
    view_size: int
    scores: Scores
    wall_s: float
    inference_s: float
    boxes_s: float
    examples: tuple[Example, ...]
    folder: Path
    record_id: str = ""
    notice: str = ""
    protocol: str = "paper"
    component: str = "pixels"
    waited_s: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gt_known(self) -> float:
        """GT-known localization at IoU 0.5 and the best CAM threshold, which is MaxBoxAcc."""
        return self.scores.max_box_acc

    @property
    def top1_loc(self) -> float:
        """Top-1 localization at IoU 0.5 and the same CAM threshold as `gt_known`."""
        return self.scores.along("iou")["top1_loc"][0]

    @property
    def top5_loc(self) -> float:
        """Top-5 localization at IoU 0.5 and the same CAM threshold as `gt_known`."""
        return self.scores.along("iou")["top5_loc"][0]

    @property
    def centre_box(self) -> float:
        """What GT-known would be with the best box in the middle of every image instead."""
        return self.scores.centre_box_acc

    def metrics(self) -> dict[str, float]:
        """Flat, as they are logged. Fractions, seconds, images/s."""
        scores = self.scores
        zhou = scores.along("iou", ZHOU_CAM_THRESHOLD)
        flat = {
            "top1": scores.top1,
            "top5": scores.top5,
            "top1_loc@0.5": self.top1_loc,
            "top5_loc@0.5": self.top5_loc,
            "gt_known@0.5": self.gt_known,
            "max_box_acc": scores.max_box_acc,
            "max_box_acc_v2": scores.max_box_acc_v2,
            "cam_threshold": scores.best_cam_threshold,
            "centre_box@0.5": self.centre_box,
            "centre_box_share": scores.centre_share,
            "zhou/top1_loc@0.5": zhou["top1_loc"][0],
            "zhou/gt_known@0.5": zhou["gt_known"][0],
            "num_images": float(scores.num_images),
            "num_without_boxes": float(scores.num_images - scores.num_located),
            "wall_s": self.wall_s,
            "images_per_s": scores.num_images / max(self.wall_s, 1e-9),
        }
        for axis in ("cam", "iou"):
            for name, values in scores.along(axis).items():
                for threshold, value in zip(READ_THRESHOLDS, values, strict=True):
                    flat[f"{axis}/{name}@{threshold:g}"] = value
        return flat

    def readings(self) -> list[dict[str, Any]]:
        """Both readings of table 9, `axis` first: {"axis", "title", "thresholds", "rows": {name: values}}."""
        best, scores = self.scores.best_cam_threshold, self.scores
        zhou = {name: row for name, row in scores.along("iou", ZHOU_CAM_THRESHOLD).items() if "centre" not in name}
        by_cam = [("cam", "CAM threshold, IoU at least 0.5", scores.along("cam"))]
        by_iou = [
            ("iou", f"IoU threshold, CAM threshold {best:g} (best at IoU 0.5)", scores.along("iou")),
            ("iou", f"IoU threshold, CAM threshold {ZHOU_CAM_THRESHOLD:g} (Zhou et al. 2016)", zhou),
        ]
        return [
            {"axis": axis, "title": title, "thresholds": READ_THRESHOLDS, "rows": rows}
            for axis, title, rows in (by_cam + by_iou if self.axis == "cam" else by_iou + by_cam)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only: what `wsol.json` holds."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        scores = {key: _plain(value) for key, value in vars(values.pop("scores")).items()}
        derived = ("best_cam_threshold", "max_box_acc", "max_box_acc_v2", "centre_share", "centre_box_acc")
        scores |= {name: getattr(self.scores, name) for name in derived}
        return {
            "job": "wsol",
            **values,
            "settings": dict(self.settings),
            "folder": str(self.folder),
            "examples": [dataclasses.asdict(example) for example in self.examples],
            "cam_thresholds": CAM_THRESHOLDS.tolist(),
            "iou_thresholds": IOU_THRESHOLDS.tolist(),
            "centre_shares": CENTRE_SHARES.tolist(),
            "scores": scores,
            "readings": self.readings(),
        }


def run(
    model_uri: str,
    *,
    data: str | None = None,
    root: Path | str | None = None,
    split: str | None = None,
    data_options: Mapping[str, Any] | None = None,
    axis: Axis = "cam",
    protocol: str = "paper",
    component: str | None = None,
    tracking_uri: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    loader: str = "dali",
    output: Path | str | None = None,
    limit: int | None = None,
    experiment: str = "lorot",
    progress: bool = True,
) -> Result:
    """Localize with a registered model on every image of a split once, and record the result beside the model.

    Args:
        model_uri: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a file.
        data, root, split, data_options: which images; what is not given is what the model was trained with and
            evaluated on.
        axis: which reading of table 9 comes first.
        protocol: "paper", or "official" for what Co-mixup's published code does.
        component: "pixels" or "contours", what the largest component has most of; default: the protocol's.
        batch_size: images per forward pass; the numbers do not depend on it.
        loader: "dali", or "torch" for the plain reference.
        output: folder of the results; default runs/wsol-NAME-VERSION-DIGEST, of the weights, the data and all settings:
            one that differs in any of them is beside it. A folder where records of an earlier run wait for the
            server is refused, since the files that they name are read when they are sent.
        limit: only so many images, drawn by a fixed seed.
        experiment: of MLflow; a run shows below its model's own if both are in the same.
        progress: show a bar if stderr is a terminal.

    Raises:
        DataError: the data has no boxes, or other classes than the model.
        CheckpointError: no such model.
        ConfigError: an unknown axis, protocol, component or device, or no word of which images; records wait in the
            output folder.
        TrackingError: the tracking server does not answer.
    """
    began = time.perf_counter()
    if axis not in ("cam", "iou"):
        raise ConfigError(f"axis {axis!r} does not exist; there are cam (CAM thresholds) and iou (IoU thresholds)")
    chosen = choose(protocol, component)
    subject = load(model_uri, tracking_uri, device)
    resolved, view = subject.resolved, subject.view
    manifest = open_data(subject, data, root, split, data_options)
    check(manifest, subject.card.classes, resolved.uri)
    about = settings(manifest, view, chosen, limit)
    folder = Path(output) if output is not None else default_folder(subject, manifest, about)
    recovery.refuse_if_waiting(folder)

    source = Source(manifest, view, pretext.load("none"), seed=0, limit=limit)
    total = len(source.sequence)
    with (
        loading.open_eval(loader, source, batch_size=batch_size, device=subject.device) as batches,
        bar(total, "localizing", "images") if progress else nullcontext(lambda count: None) as advance,
    ):
        measured = measure(subject.model, manifest, view, batches, total, advance, chosen)
    try:
        examples = write_pictures(measured, view, manifest.classes, folder, chosen)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write the pictures ({error.strerror}); choose another output folder"
        ) from None
    result = Result(
        model=subject.name,
        version=resolved.version,
        run_id=resolved.run_id,
        model_uri=resolved.uri,
        data=manifest.name,
        split=manifest.split,
        digest=manifest.digest,
        axis=axis,
        protocol=chosen.name,
        component=chosen.component,
        view_size=view.size,
        scores=measured.scores,
        wall_s=time.perf_counter() - began,
        inference_s=measured.inference_s,
        boxes_s=measured.boxes_s,
        waited_s=measured.waited_s,
        settings=about,
        examples=examples,
        folder=folder,
    )
    result = record(result, resolved, TrackingConfig(uri=tracking_uri, experiment=experiment))
    write(result)
    return result


def settings(manifest: Manifest, view: View, protocol: Protocol = PAPER, limit: int | None = None) -> dict[str, Any]:
    """All that a localization's numbers follow from, besides the weights and the images; they are recorded under it."""
    return {
        "protocol": protocol.name,
        "component": protocol.component,
        "data": manifest.name,
        "split": manifest.split,
        "view": bundle.evaluation_view(view),
        "limit": limit,
    }


def default_folder(subject: Subject, manifest: Manifest, about: Mapping[str, Any]) -> Path:
    """runs/wsol-NAME-VERSION-DIGEST: the same for the same weights, data and `settings`, and for nothing else."""
    parts = {"settings": dict(about), "data": manifest.digest, "weights": subject.card.weights_sha256}
    return Path("runs") / f"wsol-{subject.slug}-{provenance.digest(parts)[:8]}"


def record(result: Result, resolved: registry.Resolved, tracking_config: TrackingConfig) -> Result:
    """The result with its MLflow run: numbers, `wsol.json` and `cam.png` below the run that trained the model."""
    record_id, notice = registry.log_downstream(
        resolved,
        "wsol",
        result.metrics(),
        tracking_config=tracking_config,
        folder=result.folder,
        params=result.settings,
        tags={"data": result.data, "data_digest": result.digest},
        artifacts=(write(result), result.folder / "cam.png"),
        headline=HEADLINE,
    )
    return dataclasses.replace(result, record_id=record_id, notice=notice)


def write(result: Result) -> Path:
    """`wsol.json` in the result's folder."""
    path = result.folder / "wsol.json"
    path.write_text(json.dumps(result.to_dict(), indent=1))
    return path


def write_pictures(
    measured: Measured, view: View, classes: tuple[str, ...], folder: Path, protocol: Protocol
) -> tuple[Example, ...]:
    """`cam.png` and `examples/*.png` in `folder`, with boxes at the best CAM threshold; returns what they show."""
    (folder / "examples").mkdir(parents=True, exist_ok=True)
    cut = protocol.cuts(np.array([measured.scores.best_cam_threshold]))
    pictures, examples = [], []
    for seen in measured.sightings:
        window = seen.window[None]
        found = boxes.largest_component_boxes(seen.heat[None], cut, protocol.component)
        iou = float(protocol.overlap(found, [seen.truth], window, view.size)[0, 0])
        true_boxes = boxes.to_view(seen.truth[None], window, view.size)[0]
        photo = denormalise(seen.image[None], view.mean, view.std)[0]
        name = f"examples/{seen.id:08d}.png"
        Image.fromarray(overlays.overlay(photo, seen.heat)).save(folder / name, optimize=True)
        example = Example(
            id=seen.id,
            label=classes[seen.label],
            predicted=classes[seen.predicted],
            iou=iou,
            true_boxes=tuple(tuple(map(float, box)) for box in true_boxes),
            found_box=tuple(map(float, found[0, 0])),
            picture=name,
        )
        answer = "" if example.predicted == example.label else f", answered {example.predicted}"
        caption = f"{example.label}{answer}\nIoU {iou:.2f}"
        pictures.append(overlays.Picture(photo, seen.heat, true_boxes, found[0, 0], caption))
        examples.append(example)
    overlays.write_grid(pictures, folder / "cam.png")
    return tuple(examples)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


__all__ = [
    "HEADLINE",
    "Example",
    "Result",
    "default_folder",
    "record",
    "render",
    "run",
    "settings",
    "show",
    "write",
    "write_pictures",
]
