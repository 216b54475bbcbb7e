"""Weakly supervised object localization: boxes from a classifier's class activation maps. Table 9 of the LoRot paper.

The table's thresholds 0.5 to 0.9 can be read in two ways, and the paper does not say which is meant: as thresholds on
the map at a fixed IoU of 0.5 (`axis="cam"`), or as thresholds on the IoU. The whole grid is computed, both are given.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pipelines import datasets, loading, pretext
from pipelines.plan import View
from pipelines.progress import bar
from pipelines.reading import Source
from service import registry
from service.config import TrackingConfig
from service.downstream import boxes, overlays
from service.downstream.localization import Measured, check, measure
from service.downstream.scores import (
    CAM_THRESHOLDS,
    CENTRE_SHARES,
    IOU_THRESHOLDS,
    READ_THRESHOLDS,
    ZHOU_CAM_THRESHOLD,
    Axis,
    Scores,
)
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
        view_size: side of the network's input, pixels.
        scores: the numbers themselves.
        wall_s, inference_s, boxes_s: the whole job; the network alone; maps, boxes and their scores alone.
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

    @property
    def gt_known(self) -> float:
        """GT-known localization at IoU 0.5 and the best CAM threshold, which is MaxBoxAcc."""
        return self.scores.max_box_acc

    @property
    def top1_loc(self) -> float:
        """Top-1 localization at IoU 0.5 and the same CAM threshold as `gt_known`."""
        return self.scores.along("iou")["top1_loc"][0]

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
            "top1_loc@0.5": self.top1_loc,
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
        batch_size: images per forward pass; the numbers do not depend on it.
        loader: "dali", or "torch" for the plain reference.
        output: folder of the results; default runs/wsol-NAME-VERSION.
        limit: only so many images, drawn by a fixed seed.
        experiment: of MLflow; a run shows below its model's own if both are in the same.
        progress: show a bar if stderr is a terminal.

    Raises:
        DataError: the data has no boxes, or other classes than the model.
        CheckpointError: no such model.
        ConfigError: an unknown axis.
        TrackingError: the tracking server does not answer.
    """
    began = time.perf_counter()
    if axis not in ("cam", "iou"):
        raise ConfigError(f"axis {axis!r} does not exist; there are cam (CAM thresholds) and iou (IoU thresholds)")
    model, card, resolved = registry.load(model_uri, tracking_uri=tracking_uri)
    if data_options is None:
        data_options = card.data_options if data in (None, card.data) else {}
    if data not in (None, card.data) and root is None:
        raise ConfigError(f"{resolved.uri} was trained on {card.data!r}; say where {data!r} lies with --root FOLDER")
    manifest = datasets.load(data or card.data, root or card.root, split or card.split, **data_options)
    check(manifest, card.classes, resolved.uri)
    view = View(**card.view)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    model = model.to(memory_format=torch.channels_last).to(place)
    name = resolved.name or resolved.folder.resolve().name
    about = name if resolved.version is None else f"{name}-{resolved.version}"
    folder = Path(output) if output is not None else Path("runs") / f"wsol-{about}"

    source = Source(manifest, view, pretext.load("none"), seed=0, limit=limit)
    total = len(source.sequence)
    with (
        loading.open_eval(loader, source, batch_size=batch_size, device=place) as batches,
        bar(total, "localizing", "images") if progress else nullcontext(lambda count: None) as advance,
    ):
        measured = measure(model, manifest, view, batches, total, advance)
    try:
        examples = write_pictures(measured, view, manifest.classes, folder)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write the pictures ({error.strerror}); choose another output folder"
        ) from None
    result = Result(
        model=name,
        version=resolved.version,
        run_id=resolved.run_id,
        model_uri=resolved.uri,
        data=manifest.name,
        split=manifest.split,
        digest=manifest.digest,
        axis=axis,
        view_size=view.size,
        scores=measured.scores,
        wall_s=time.perf_counter() - began,
        inference_s=measured.inference_s,
        boxes_s=measured.boxes_s,
        examples=examples,
        folder=folder,
    )
    result = record(result, resolved, TrackingConfig(uri=tracking_uri, experiment=experiment))
    write(result)
    return result


def record(result: Result, resolved: registry.Resolved, tracking_config: TrackingConfig) -> Result:
    """The result with its MLflow run: numbers, `wsol.json` and `cam.png` below the run that trained the model."""
    record_id, notice = registry.log_downstream(
        resolved,
        "wsol",
        result.metrics(),
        tracking_config=tracking_config,
        folder=result.folder,
        params={"axis": result.axis, "data": result.data, "split": result.split, "view_size": result.view_size},
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


def write_pictures(measured: Measured, view: View, classes: tuple[str, ...], folder: Path) -> tuple[Example, ...]:
    """`cam.png` and `examples/*.png` in `folder`, with boxes at the best CAM threshold; returns what they show."""
    (folder / "examples").mkdir(parents=True, exist_ok=True)
    cut = np.array([measured.scores.best_cam_threshold])
    pictures, examples = [], []
    for seen in measured.sightings:
        window = seen.window[None]
        found = boxes.largest_component_boxes(seen.heat[None], cut)
        iou = float(boxes.best_iou(boxes.to_source(found, window, view.size), [seen.truth])[0, 0])
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


_ROW_TITLES = {
    "top1_loc": "top-1 localization",
    "gt_known": "GT-known localization",
    "centre_top1_loc": "centre box, top-1",
    "centre_gt_known": "centre box, GT-known",
}


def render(result: Result) -> Group:
    """The result for a terminal: `rich.print(render(result))`. Numbers in per cent."""
    scores = result.scores
    version = f" version {result.version}" if result.version is not None else ""
    head = Text.assemble(
        (f"{result.model}{version}", "bold"),
        f" on {result.data}/{result.split}: {scores.num_images:,} images, "
        f"top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}",
    )
    parts: list[Any] = [head]
    for reading in result.readings():
        table = Table(title=f"axis={reading['axis']}: {reading['title']}", title_justify="left", title_style="")
        table.add_column("per cent")
        for threshold in reading["thresholds"]:
            table.add_column(f"{threshold:g}", justify="right")
        for name, values in reading["rows"].items():
            style = "dim" if name.startswith("centre") else ""
            table.add_row(_ROW_TITLES[name], *(f"{100 * value:.2f}" for value in values), style=style)
        parts.append(table)
    summary = Table.grid(padding=(0, 2))
    cut, side = f"{scores.best_cam_threshold:g}", f"{scores.centre_share:.0%}"
    summary.add_row("MaxBoxAcc", f"{scores.max_box_acc:.2%}", f"GT-known at IoU 0.5 and the best CAM threshold, {cut}")
    summary.add_row("MaxBoxAccV2", f"{scores.max_box_acc_v2:.2%}", "mean of the best at IoU 0.3, 0.5 and 0.7")
    summary.add_row(
        "centre box", f"{scores.centre_box_acc:.2%}", f"GT-known at IoU 0.5, the best size: {side} of both sides"
    )
    parts.append(summary)
    if scores.num_located < scores.num_images:
        missing = scores.num_images - scores.num_located
        parts.append(Text(f"{missing:,} images have no true box and count in top-1 and top-5 only", style="yellow"))
    rate = scores.num_images / max(result.wall_s, 1e-9)
    share = result.boxes_s / max(result.inference_s, 1e-9)
    parts.append(Text(f"{result.wall_s:.1f} s, {rate:,.0f} images/s, maps and boxes {share:.0%} of the network's time"))
    parts.append(Text(f"{result.folder}/cam.png, wsol.json", style="dim"))
    if result.notice:
        parts.append(Text(result.notice, style="yellow"))
    return Group(*parts)


def show(result: Result, console: Console) -> None:
    """Print `render(result)`."""
    console.print(render(result))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
