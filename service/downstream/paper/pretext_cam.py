"""Where a model looks to tell which part of an image was turned, cell by cell (fig. 4 of the LoRot paper)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines import pretext
from pipelines.batch import Batch
from pipelines.errors import LorotError
from pipelines.randomness import integers
from pipelines.torch_reference import rotate_patch
from service.downstream import cam
from service.downstream.overlays import FOUND_COLOUR
from service.downstream.paper import sheet
from service.downstream.paper.asking import Drawn, ImpossibleError, Question
from service.downstream.paper.sheet import Tile
from service.downstream.subject import Subject
from service.errors import ConfigError
from service.pictures import denormalise

# A grid of more cells makes no figure.
_MOST_CELLS = 16


def draw(question: Question, folder: Path) -> Drawn:
    """`pretext-cam-MODEL.png` for every model that predicts a local rotation: a row a cell, a column an image.

    The cell's content is turned by one to three quarters, drawn from the seed, and framed; over it lies the map of the
    pretext label that the model predicts. Numbers over all images and cells: `accuracy` of that prediction, and
    `inside`, the mean share of the map's heat that lies in the turned cell; `chance` is the cell's share of the image.

    Raises:
        ImpossibleError: no model predicts LoRot-E's or LoRot-I's labels.
        ConfigError: a model's input cannot be divided into its cells.
    """
    metrics: list[dict[str, float]] = []
    numbers, pictures, left_out = [], [], []
    for subject, label in zip(question.subjects, question.labels, strict=True):
        if subject.model.pretext_fc is None or subject.card.pretext not in ("lorot_e", "lorot_i"):
            metrics.append({})
            left_out.append(f"{subject.title} (pretext {subject.card.pretext})")
            continue
        grid = _grid(subject)
        shown = _look(question, subject, grid)
        name = f"pretext-cam-{label}.png"
        tiles = [[Tile(one["photo"], one["heat"], one["frames"], one["caption"]) for one in row] for row in shown]
        title = f"{subject.title}: maps of the {subject.card.pretext} prediction; the turned cell is framed"
        sheet.write(tiles, (), title, folder / name)
        found = _measure(question, subject, grid)
        metrics.append(found)
        keys = ("id", "cell", "turns", "label", "predicted", "inside")
        examples = [{key: one[key] for key in keys} for row in shown for one in row]
        numbers.append({"model": subject.resolved.uri, **found, "examples": examples})
        pictures.append(name)
    if not pictures:
        raise ImpossibleError(
            f"no model predicts a local rotation: {', '.join(left_out)}; train with pretext.name=lorot_e or lorot_i"
        )
    notice = f"no pretext map of {', '.join(left_out)}: it predicts no local rotation" if left_out else ""
    return Drawn(tuple(metrics), {"models": numbers}, tuple(pictures), notice)


def _grid(subject: Subject) -> int:
    """Cells along a side: those of the model's LoRot-E, and quadrants for LoRot-I."""
    card, size = subject.card, subject.view.size
    task = pretext.load(card.pretext, **card.pretext_options)
    try:
        task.sample(0, 0, np.zeros(1, np.int64), size)
    except LorotError as error:
        raise ConfigError(f"{subject.title} sees images of {size} pixels: {error}") from None
    grid = int(getattr(task, "grid", 2))
    if card.num_pretext != task.num_labels or grid**2 > _MOST_CELLS:
        raise ConfigError(
            f"{subject.title}: {card.num_pretext} pretext labels and {grid**2} cells; a figure takes at most "
            f"{_MOST_CELLS} cells, and {task.num_labels} labels of {card.pretext}"
        )
    return grid


@torch.inference_mode()
def _ask(
    question: Question, subject: Subject, grid: int, cell: int, batch: Batch, pictured: bool
) -> Iterator[dict[str, Any]]:
    """What the model makes of every valid image with this cell turned, `pictured` or in numbers alone."""
    model, size = subject.model, subject.view.size
    assert model.pretext_fc is not None
    side = size // grid
    y, x = cell // grid * side, cell % grid * side
    ids = batch.ids.cpu().numpy()
    turns = integers(question.seed, 0, ids, f"figures/turn {cell}", 1, 3)
    images = rotate_patch(batch.images, np.tile([y, x, side], (len(ids), 1)), turns)
    features = model.features(images)
    predicted = model.pretext_fc(features.mean(dim=(2, 3))).argmax(dim=1)
    maps = cam.class_activation_maps(features, model.pretext_fc.weight, predicted)
    heat = cam.heatmaps(maps, size).cpu().numpy()
    shown = images.float().cpu().numpy() if pictured else np.zeros((0, 3, size, size), np.float32)
    photos = denormalise(shown, subject.view.mean, subject.view.std)
    frame = np.array([x, y, x + side, y + side])
    for row in np.flatnonzero(batch.valid.cpu().numpy()):
        label = int(turns[row]) + (4 * cell if subject.card.pretext == "lorot_e" else 0)
        answer = int(predicted[row])
        yield {
            "id": int(ids[row]),
            "cell": cell,
            "turns": int(turns[row]),
            "label": label,
            "predicted": answer,
            "inside": float(heat[row, y : y + side, x : x + side].sum() / heat[row].sum()),
            "photo": photos[row] if pictured else None,
            "heat": heat[row],
            "frames": ((frame, FOUND_COLOUR),),
            "caption": f"turned {90 * int(turns[row])}°\n{_words(subject, answer, label)}",
        }


def _words(subject: Subject, answer: int, label: int) -> str:
    if answer == label:
        return "recognised"
    where = f"cell {answer // 4 + 1}, " if subject.card.pretext == "lorot_e" else ""
    return f"taken for {where}{90 * (answer % 4)}°"


def _look(question: Question, subject: Subject, grid: int) -> list[list[dict[str, Any]]]:
    """A row a cell, of as many images as are shown."""
    rows: list[list[dict[str, Any]]] = [[] for _ in range(grid**2)]
    for batch in question.batches(subject, question.images):
        for cell, row in enumerate(rows):
            row += _ask(question, subject, grid, cell, batch, pictured=True)
    return rows


def _measure(question: Question, subject: Subject, grid: int) -> dict[str, float]:
    asked, right, inside = 0, 0, 0.0
    for batch in question.batches(subject, question.limit):
        for cell in range(grid**2):
            for one in _ask(question, subject, grid, cell, batch, pictured=False):
                asked += 1
                right += one["predicted"] == one["label"]
                inside += one["inside"]
    size = subject.view.size
    chance = (size // grid) ** 2 / size**2
    return {"num_asked": float(asked), "accuracy": right / asked, "inside": inside / asked, "chance": chance}
