"""LoRot-E: predict which cell of a grid is turned, and how far (LoRot, section 3; K = 2 in the paper)."""

from dataclasses import dataclass

import numpy as np

from pipelines.errors import LorotError
from pipelines.randomness import scale_to_integers, uniform


@dataclass(frozen=True)
class Task:
    """One cell of a grid x grid division; label = 4 * cell + turns, cells row-major.

    The four redundant labels of an unturned image, one a cell, are kept on purpose, as in the paper.

    Attributes:
        grid: K, cells along a side.
    """

    grid: int = 2

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise LorotError(f"lorot_e grid {self.grid}: needs 1 cell a side or more")

    @property
    def num_labels(self) -> int:
        """Four turns of each cell."""
        return 4 * self.grid**2

    def sample(
        self, seed: int, epoch: int | np.ndarray, ids: np.ndarray, size: int, *, step: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes (N, 3), turns (N,) and labels (N,), all int64; raises LorotError if the grid does not divide size."""
        if size % self.grid:
            nearest = max(1, round(size / self.grid)) * self.grid
            raise LorotError(
                f"lorot_e grid {self.grid} does not divide images of {size} pixels a side; "
                f"sizes that are multiples of {self.grid} work, such as {nearest}"
            )
        side = size // self.grid
        drawn = uniform(seed, epoch, ids, "lorot_e", num=2)
        cells = scale_to_integers(drawn[:, 0], 0, self.grid**2 - 1)
        turns = scale_to_integers(drawn[:, 1], 0, 3)
        boxes = np.stack([cells // self.grid * side, cells % self.grid * side, np.full_like(cells, side)], axis=1)
        return boxes, turns, 4 * cells + turns


num_labels = Task().num_labels
sample = Task().sample
