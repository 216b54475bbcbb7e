"""Features of original and of transformed images side by side, embedded by t-SNE (fig. 1 of the LoRot paper)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.pretext import PretextTask
from pipelines.torch_reference import rotate_patch
from service.downstream.paper.asking import Drawn, ImpossibleError, Question
from service.downstream.subject import Subject
from service.errors import ConfigError

# Fewer say nothing, and t-SNE's neighbourhoods would be larger than the set.
FEWEST_POINTS = 10
_PERPLEXITY = 30.0


def draw(question: Question, folder: Path) -> Drawn:
    """`tsne.png`: a row a model, a column a transformation; originals red, transformed ones blue and drawn over them.

    A point is an image's feature vector behind the last convolution, averaged over space, as the classifier sees it.
    Both kinds of a panel are embedded together (van der Maaten and Hinton, 2008; perplexity 30, begun from the
    principal components, with a fixed seed). Where the transformation does not move the distribution, blue hides red.

    Raises:
        ImpossibleError: scikit-learn is not installed.
        ConfigError: too few points, or a task that does not fit a model's input.
    """
    tsne = _tsne()
    if min(question.points, len(question.manifest)) < FEWEST_POINTS:
        raise ConfigError(f"a t-SNE needs at least {FEWEST_POINTS} images; give more with --points, or another split")
    metrics, numbers = [], []
    for subject in question.subjects:
        tasks = question.transformations(subject)
        vectors = _features(question, subject, tasks)
        ids, original = vectors.pop("id").astype(int), vectors.pop("original")
        found: dict[str, float] = {}
        panels: dict[str, Any] = {}
        for name, transformed in vectors.items():
            both = np.concatenate([original, transformed])
            fitted = tsne(perplexity=min(_PERPLEXITY, (len(both) - 1) / 3), init="pca", random_state=question.seed)
            places = fitted.fit_transform(both)
            found[f"{name}/kl_divergence"] = float(fitted.kl_divergence_)
            panels[name] = {
                "kl_divergence": found[f"{name}/kl_divergence"],
                "original": np.round(places[: len(original)], 3).tolist(),
                "transformed": np.round(places[len(original) :], 3).tolist(),
            }
        metrics.append(found)
        numbers.append({"model": subject.resolved.uri, "ids": ids.tolist(), "panels": panels})
    _plot(question, numbers, folder / "tsne.png")
    return Drawn(tuple(metrics), {"tasks": list(question.tasks), "models": numbers}, ("tsne.png",))


def _tsne() -> Any:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ImpossibleError("a t-SNE needs scikit-learn: pip install 'lorot[figures]'") from None
    return TSNE


@torch.inference_mode()
def _features(question: Question, subject: Subject, tasks: dict[str, PretextTask]) -> dict[str, np.ndarray]:
    """Feature vectors (N, C) of the "original" images and under each task, and each image's "id" (N,)."""
    gathered: dict[str, list[np.ndarray]] = {name: [] for name in ("id", "original", *tasks)}
    for batch in question.batches(subject, question.points):
        valid, ids = batch.valid.cpu().numpy(), batch.ids.cpu().numpy()
        gathered["id"].append(ids[valid])
        gathered["original"].append(_pooled(subject, batch.images)[valid])
        for name, task in tasks.items():
            boxes, turns, _ = task.sample(question.seed, 0, ids, subject.view.size)
            gathered[name].append(_pooled(subject, rotate_patch(batch.images, boxes, turns))[valid])
    return {name: np.concatenate(parts) for name, parts in gathered.items()}


def _pooled(subject: Subject, images: torch.Tensor) -> np.ndarray:
    return subject.model.features(images).mean(dim=(2, 3)).float().cpu().numpy()


def _plot(question: Question, numbers: list[dict[str, Any]], path: Path) -> None:
    rows, columns = len(numbers), len(question.tasks)
    figure: Any = Figure(figsize=(3.0 * columns, 3.0 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for subject, found, row in zip(question.subjects, numbers, grid, strict=True):
        row[0].set_ylabel(subject.title, fontsize=9)
        for name, axes in zip(question.tasks, row, strict=True):
            for kind, colour in (("original", "#d62728"), ("transformed", "#1f77b4")):
                x, y = np.array(found["panels"][name][kind]).T
                axes.scatter(x, y, s=6, c=colour, linewidths=0, label=kind)
            axes.set_title(name, fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9, frameon=False, markerscale=2)
    figure.savefig(path, dpi=110)
