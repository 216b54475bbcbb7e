"""No pretext task: nothing turns, nothing is predicted."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Task:
    """The box covers the image, the turn is 0, and there are no labels."""

    @property
    def num_labels(self) -> int:
        """None to predict."""
        return 0

    def sample(
        self, seed: int, epoch: int | np.ndarray, ids: np.ndarray, size: int, *, step: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes (N, 3), turns (N,) and labels (N,), all int64."""
        boxes = np.tile(np.array([0, 0, size], dtype=np.int64), (len(ids), 1))
        return boxes, np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)


num_labels = Task().num_labels
sample = Task().sample
