"""Class activation maps of several models on the same images (fig. 3 of the LoRot paper)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.batch import Batch
from pipelines.manifest import Manifest
from pipelines.plan import eval_plan
from service.downstream import boxes, cam
from service.downstream.overlays import TRUE_COLOUR
from service.downstream.paper import sheet
from service.downstream.paper.asking import Drawn, Question
from service.downstream.paper.sheet import Tile
from service.downstream.subject import Subject
from service.pictures import denormalise

# What counts as lit, of a map stretched to 0 .. 1.
HOT = 0.5


def draw(question: Question, folder: Path) -> Drawn:
    """`cam.png`: a row an image, a column a model, the map of the true class over the image.

    Where the data has boxes, the claim that goes with the figure is put into numbers over all images: `coverage`, the
    mean share of the true boxes that is lit (HOT or more), and `inside`, the mean share of what is lit that lies in
    them. A map that lights everything covers all and is seldom inside: neither says much without the other.
    """
    shown: list[list[Tile]] = []
    metrics, numbers = [], []
    for subject in question.subjects:
        pictured = list(_look(question, subject, question.images))
        if not shown:
            shown = [[Tile(one["photo"], None, one["frames"], one["label"])] for one in pictured]
        for row, one in zip(shown, pictured, strict=True):
            row.append(Tile(one["photo"], one["heat"], one["frames"], one["caption"]))
        found = _measure(question, subject)
        metrics.append({name: value for name, value in found.items() if value is not None})
        examples = [{key: one[key] for key in ("id", "label", "predicted", "probability")} for one in pictured]
        numbers.append({"model": subject.resolved.uri, **found, "examples": examples})
    titles = ["image", *(subject.title for subject in question.subjects)]
    data = question.manifest
    sheet.write(shown, titles, f"class activation maps of the true class, {data.name} {data.split}", folder / "cam.png")
    return Drawn(tuple(metrics), {"hot": HOT, "models": numbers}, ("cam.png",))


@torch.inference_mode()
def _heat(subject: Subject, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities (N, K), and the true classes' maps (N, S, S) in 0 .. 1."""
    features, fc = subject.model.features(batch.images), subject.model.fc
    probabilities = fc(features.mean(dim=(2, 3))).softmax(dim=1)
    maps = cam.class_activation_maps(features, fc.weight, batch.labels)
    return probabilities.cpu().numpy(), cam.heatmaps(maps, subject.view.size).cpu().numpy()


def _look(question: Question, subject: Subject, count: int) -> Iterator[dict[str, Any]]:
    manifest, view, classes = question.manifest, subject.view, question.manifest.classes
    for batch in question.batches(subject, count):
        probabilities, heat = _heat(subject, batch)
        photos = denormalise(batch.images.float().cpu().numpy(), view.mean, view.std)
        for row in np.flatnonzero(batch.valid.cpu().numpy()):
            sample, predicted = int(batch.ids[row]), int(probabilities[row].argmax())
            label, share = classes[int(batch.labels[row])], float(probabilities[row, predicted])
            yield {
                "id": sample,
                "label": label,
                "predicted": classes[predicted],
                "probability": share,
                "photo": photos[row],
                "heat": heat[row],
                "frames": tuple((box, TRUE_COLOUR) for box in _seen_boxes(manifest, subject, sample)),
                "caption": f"{classes[predicted]} {share:.0%}" + ("" if classes[predicted] == label else ", wrong"),
            }


def _measure(question: Question, subject: Subject) -> dict[str, float | None]:
    images, right, located, coverage, inside = 0, 0, 0, 0.0, 0.0
    for batch in question.batches(subject, question.limit):
        probabilities, heat = _heat(subject, batch)
        labels = batch.labels.cpu().numpy()
        for row in np.flatnonzero(batch.valid.cpu().numpy()):
            images += 1
            right += int(probabilities[row].argmax() == labels[row])
            within = _mask(_seen_boxes(question.manifest, subject, int(batch.ids[row])), subject.view.size)
            if within.any():
                lit = heat[row] >= HOT
                located += 1
                coverage += float((lit & within).sum() / within.sum())
                inside += float((lit & within).sum() / lit.sum())
    return {
        "num_images": float(images),
        "top1": right / max(images, 1),
        "num_located": float(located),
        "coverage": coverage / located if located else None,
        "inside": inside / located if located else None,
    }


def _seen_boxes(manifest: Manifest, subject: Subject, sample: int) -> np.ndarray:
    """True boxes (M, 4) in pixels of the model's input; what it does not see lies outside of it."""
    heights, widths = manifest.heights[[sample]], manifest.widths[[sample]]
    windows = eval_plan(subject.view, np.array([sample]), heights, widths, np.ones(1, bool)).windows
    return boxes.to_view(manifest.boxes(sample)[None], windows, subject.view.size)[0]


def _mask(found: np.ndarray, size: int) -> np.ndarray:
    """(size, size) bool, true within any of the boxes."""
    mask = np.zeros((size, size), bool)
    for x_min, y_min, x_max, y_max in np.clip(np.rint(found), 0, size).astype(int):
        mask[y_min:y_max, x_min:x_max] = True
    return mask
