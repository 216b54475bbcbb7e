"""RandAugment: some operations, each drawn from the same list, all at one magnitude (Cubuk et al., CVPRW 2020)."""

from dataclasses import dataclass

import numpy as np

from pipelines.augment.levels import CHOICES, STANDARD
from pipelines.augment.operations import Operation
from pipelines.errors import LorotError
from pipelines.randomness import scale_to_integers, uniform


@dataclass(frozen=True)
class Augmentation:
    """As torchvision's RandAugment with its default interpolation and fill.

    Attributes:
        num_ops: operations one after the other, with repetition.
        magnitude: bin of every operation's level, 0 to num_magnitude_bins - 1.
        num_magnitude_bins: into how many the range of levels is divided.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31

    def __post_init__(self) -> None:
        if self.num_ops < 1:
            raise LorotError(f"rand_augment num_ops {self.num_ops}: needs 1 or more")
        if self.num_magnitude_bins < 2:
            raise LorotError(f"rand_augment num_magnitude_bins {self.num_magnitude_bins}: needs 2 or more")
        if not 0 <= self.magnitude < self.num_magnitude_bins:
            raise LorotError(
                f"rand_augment magnitude {self.magnitude} is not within 0 and {self.num_magnitude_bins - 1}, "
                f"the bins of num_magnitude_bins {self.num_magnitude_bins}"
            )

    @property
    def slots(self) -> tuple[frozenset[Operation], ...]:
        """Any of the 14, `num_ops` times."""
        return (frozenset(CHOICES),) * self.num_ops

    def sample(self, seed: int, epochs: int | np.ndarray, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes (N, num_ops) int64 and amounts (N, num_ops, 4) float32."""
        drawn = uniform(seed, epochs, ids, "rand_augment", num=2 * self.num_ops)
        codes = np.array(CHOICES, np.int64)[scale_to_integers(drawn[:, 0::2], 0, len(CHOICES) - 1)]
        negative = drawn[:, 1::2] < 0.5
        flat = np.full(codes.size, self.magnitude)
        amounts = STANDARD.amounts(codes.ravel(), flat, negative.ravel(), self.num_magnitude_bins, size)
        return codes, amounts.reshape(*codes.shape, 4)
