"""TrivialAugment: one operation at a random magnitude, in the "wide" space (Müller and Hutter, ICCV 2021)."""

from dataclasses import dataclass

import numpy as np

from pipelines.augment.levels import CHOICES, WIDE
from pipelines.augment.operations import Operation
from pipelines.errors import LorotError
from pipelines.randomness import scale_to_integers, uniform


@dataclass(frozen=True)
class Augmentation:
    """As torchvision's TrivialAugmentWide with its default interpolation and fill.

    Attributes:
        num_magnitude_bins: into how many the range of levels is divided.
    """

    num_magnitude_bins: int = 31

    def __post_init__(self) -> None:
        if self.num_magnitude_bins < 2:
            raise LorotError(f"trivial_augment num_magnitude_bins {self.num_magnitude_bins}: needs 2 or more")

    @property
    def slots(self) -> tuple[frozenset[Operation], ...]:
        """Any of the 14, once."""
        return (frozenset(CHOICES),)

    def sample(self, seed: int, epochs: int | np.ndarray, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes (N, 1) int64 and amounts (N, 1, 4) float32."""
        drawn = uniform(seed, epochs, ids, "trivial_augment", num=3)
        codes = np.array(CHOICES, np.int64)[scale_to_integers(drawn[:, 0], 0, len(CHOICES) - 1)]
        bins = scale_to_integers(drawn[:, 1], 0, self.num_magnitude_bins - 1)
        amounts = WIDE.amounts(codes, bins, drawn[:, 2] < 0.5, self.num_magnitude_bins, size)
        return codes[:, None], amounts[:, None]
