"""How far a transformation moves images away from what a model was trained on: the affinity score (eq. 1, table 2)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.pretext import PretextTask
from pipelines.torch_reference import rotate_patch
from service.downstream.paper.asking import Drawn, Question
from service.downstream.subject import Subject
from service.errors import DataError

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


def draw(question: Question, folder: Path) -> Drawn:
    """`affinity.png`: the score of every model under every transformation, in per cent.

    The paper (eq. 1, after Gontijo-Lopes et al., "Tradeoffs in data augmentation", ICLR 2021) divides two accuracies
    of one model: A(m, D'_val) / A(m, D_val), "the accuracy of m on a dataset D", where D'_val is the augmented
    validation set. Table 2 asks a model trained on CIFAR-10 without a pretext task; any model may be asked here, and
    one that has trained with a transformation is used to it, so that its score says less of the transformation.

    Every image is transformed once, by its pretext task's own draw for it: turns of 0 degrees are among them, as in
    training. The paper does not say how often it drew.

    Raises:
        ConfigError: a task does not fit a model's input.
        DataError: a model gets no image of the validation set right, so that there is nothing to divide by.
    """
    metrics, numbers = [], []
    for subject in question.subjects:
        tasks = question.transformations(subject)
        images, clean, right = _count(question, subject, tasks)
        if clean == 0:
            raise DataError(
                f"{subject.title} classifies none of {images} images of {question.manifest.name} "
                f"{question.manifest.split} rightly: affinity divides by that; ask a trained model, or more images"
            )
        metrics.append({name: count / clean for name, count in right.items()})
        numbers.append(
            {
                "model": subject.resolved.uri,
                "pretext": subject.card.pretext,
                "num_images": images,
                "accuracy": clean / images,
                "transformed_accuracy": {name: count / images for name, count in right.items()},
                "affinity": metrics[-1],
            }
        )
    _plot(question, metrics, folder / "affinity.png")
    return Drawn(tuple(metrics), {"tasks": list(question.tasks), "models": numbers}, ("affinity.png",))


@torch.inference_mode()
def _count(question: Question, subject: Subject, tasks: dict[str, PretextTask]) -> tuple[int, int, dict[str, int]]:
    """Images seen, those classified rightly as they are, and those under each transformation."""
    images, clean, right = 0, 0, dict.fromkeys(tasks, 0)
    for batch in question.batches(subject, question.limit):
        images += int(batch.valid.sum())
        clean += _right(subject, batch.images, batch.labels, batch.valid)
        ids = batch.ids.cpu().numpy()
        for name, task in tasks.items():
            # Turning a square of a normalised image is turning it before: every pixel of a channel is treated alike.
            boxes, turns, _ = task.sample(question.seed, 0, ids, subject.view.size)
            right[name] += _right(subject, rotate_patch(batch.images, boxes, turns), batch.labels, batch.valid)
    return images, clean, right


def _right(subject: Subject, images: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> int:
    return int(((subject.model(images).logits.argmax(dim=1) == labels) & valid).sum())


def _plot(question: Question, metrics: list[dict[str, float]], path: Path) -> None:
    count = len(metrics)
    figure: Any = Figure(figsize=(max(5.0, 1.2 + 0.8 * count * len(question.tasks)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places, width = np.arange(len(question.tasks)), 0.8 / count
    for index, (subject, found) in enumerate(zip(question.subjects, metrics, strict=True)):
        values = [100 * found[name] for name in question.tasks]
        shifted = places + (index - (count - 1) / 2) * width
        bars = axes.bar(shifted, values, 0.92 * width, label=subject.title, color=_COLOURS[index % len(_COLOURS)])
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(places, question.tasks)
    axes.set_ylabel("affinity, per cent")
    axes.set_title(f"affinity on {question.manifest.name} {question.manifest.split} (100: no shift)", fontsize=10)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(count, 3), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
