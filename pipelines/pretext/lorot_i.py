"""LoRot-I: predict how far a random square of the image is turned (LoRot, equation 4)."""

from dataclasses import dataclass

import numpy as np

from pipelines.errors import LorotError
from pipelines.randomness import scale_to_integers, uniform

SHORTEST = 2


@dataclass(frozen=True)
class Task:
    """A square of side 2 to size // 2, anywhere in the image; the label is the number of quarter turns.

    Attributes:
        protocol: "paper" draws a box per image, all bounds inclusive. "official" is the published code: one box for
            the whole batch of a step and a turn per image, and a box never reaches the last row or column.
    """

    protocol: str = "paper"

    def __post_init__(self) -> None:
        if self.protocol not in ("paper", "official"):
            raise LorotError(f"lorot_i protocol {self.protocol!r} does not exist; there are paper, official")

    @property
    def num_labels(self) -> int:
        """Four turns."""
        return 4

    def sample(
        self, seed: int, epoch: int | np.ndarray, ids: np.ndarray, size: int, *, step: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes (N, 3), turns (N,) and labels (N,), all int64; raises LorotError for images too small for a box."""
        if size < 2 * SHORTEST:
            raise LorotError(f"lorot_i needs images of {2 * SHORTEST} pixels or more a side, not {size}")
        drawn = uniform(seed, epoch, ids, "lorot_i", num=4)
        turns = scale_to_integers(drawn[:, 0], 0, 3)
        if self.protocol == "paper":
            boxes = _boxes(drawn[:, 1:], size, excluded=0)
        else:
            drawn = uniform(seed, 0, np.array([step]), "lorot_i/step", num=3)
            boxes = np.repeat(_boxes(drawn, size, excluded=1), len(ids), axis=0)
        return boxes, turns, turns


def _boxes(numbers: np.ndarray, size: int, excluded: int) -> np.ndarray:
    """Boxes (N, 3) from uniforms (N, 3); the last `excluded` positions on each axis are never drawn."""
    side = scale_to_integers(numbers[:, 0], SHORTEST, size // 2)
    y = scale_to_integers(numbers[:, 1], 0, size - side - excluded)
    x = scale_to_integers(numbers[:, 2], 0, size - side - excluded)
    return np.stack([y, x, side], axis=1)


num_labels = Task().num_labels
sample = Task().sample
