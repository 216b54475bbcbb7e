"""What every figure is given, and what it gives back."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines import loading, pretext
from pipelines.batch import Batch
from pipelines.errors import LorotError
from pipelines.manifest import Manifest
from pipelines.pretext import PretextTask
from pipelines.reading import Source
from service.downstream.subject import Subject
from service.errors import ConfigError


class ImpossibleError(ConfigError):
    """This figure cannot be made of these models, or on this machine; others can."""


@dataclass(frozen=True)
class Question:
    """Which models are asked, and about which images; all models see the same ones.

    Attributes:
        subjects: the models; their classes are the data's.
        labels: one for each, distinct, fit to be a file's name.
        images: shown in pictures.
        limit: that numbers are taken over, drawn by the seed; None: the whole split.
        points: images of a t-SNE.
        tasks: transformations by the names of their pretext tasks.
        seed: of every draw.
    """

    subjects: tuple[Subject, ...]
    labels: tuple[str, ...]
    manifest: Manifest
    images: int
    limit: int | None
    points: int
    tasks: tuple[str, ...]
    seed: int
    batch_size: int
    loader: str

    def batches(self, subject: Subject, limit: int | None) -> Iterator[Batch]:
        """`limit` images as a model sees them, on its device, each once."""
        count = None if limit is None else min(limit, len(self.manifest))
        source = Source(self.manifest, subject.view, pretext.load("none"), seed=self.seed, limit=count)
        with loading.open_eval(
            self.loader, source, batch_size=min(self.batch_size, len(source.sequence)), device=subject.device
        ) as batches:
            yield from batches

    def transformations(self, subject: Subject) -> dict[str, PretextTask]:
        """The tasks by name; raises ConfigError if one has nothing to turn, or does not fit the model's input."""
        found = {}
        for name in self.tasks:
            task = pretext.load(name)
            if task.num_labels == 0:
                raise ConfigError(f"pretext task {name!r} transforms nothing; there are {', '.join(_turning())}")
            try:
                task.sample(self.seed, 0, np.zeros(1, np.int64), subject.view.size)
            except LorotError as error:
                raise ConfigError(f"{subject.title} sees images of {subject.view.size} pixels: {error}") from None
            found[name] = task
        return found


@dataclass(frozen=True)
class Drawn:
    """What became of a figure.

    Attributes:
        metrics: for each model, the numbers to record.
        numbers: all that is in the pictures, as JSON values.
        pictures: files, by their names in the output folder.
        notice: what is missing and why; else empty.
    """

    metrics: tuple[dict[str, float], ...]
    numbers: dict[str, Any]
    pictures: tuple[str, ...]
    notice: str = ""


def _turning() -> list[str]:
    return [name for name in pretext.available() if pretext.load(name).num_labels]
