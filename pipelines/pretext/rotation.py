"""Predict how far the whole image is turned (Gidaris et al., ICLR 2018): "Rot" in the tables of the LoRot paper."""

from dataclasses import dataclass

import numpy as np

from pipelines.randomness import integers


@dataclass(frozen=True)
class Task:
    """The box covers the image; the label is the number of quarter turns."""

    @property
    def num_labels(self) -> int:
        """Four turns."""
        return 4

    def sample(
        self, seed: int, epoch: int | np.ndarray, ids: np.ndarray, size: int, *, step: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes (N, 3), turns (N,) and labels (N,), all int64."""
        boxes = np.tile(np.array([0, 0, size], dtype=np.int64), (len(ids), 1))
        turns = integers(seed, epoch, ids, "rotation", 0, 3)
        return boxes, turns, turns


num_labels = Task().num_labels
sample = Task().sample
