"""Random erasing: a rectangle of the input is set to the mean colour (Zhong et al., AAAI 2020)."""

import math
from dataclasses import dataclass

import numpy as np

from pipelines.augment.operations import Operation
from pipelines.errors import LorotError
from pipelines.randomness import scale_to_integers, uniform

# As in torchvision's RandomErasing, which then erases nothing.
TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """As torchvision's RandomErasing after normalisation, with value 0.

    Attributes:
        p: share of the images in which something is erased.
        scale: from and to which share of the area.
        ratio: from and to which height / width.
    """

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise LorotError(f"random_erasing p {self.p}: needs a share above 0 and at most 1, as 0.25")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise LorotError(f"random_erasing scale {self.scale}: needs 0 < from <= to <= 1, as in (0.02, 0.33)")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise LorotError(f"random_erasing ratio {self.ratio}: needs 0 < from <= to, as in (0.3, 3.3)")

    @property
    def slots(self) -> tuple[frozenset[Operation], ...]:
        """One rectangle at most."""
        return (frozenset([Operation.ERASE]),)

    def sample(self, seed: int, epochs: int | np.ndarray, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes (N, 1) int64 and amounts (N, 1, 4) float32: (y, x, height, width) inside the input, whole numbers."""
        drawn = uniform(seed, epochs, ids, "random_erasing", num=3 + 2 * TRIES)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        areas = size * size * (self.scale[0] + (self.scale[1] - self.scale[0]) * drawn[:, 3::2])
        ratios = np.exp(low + (high - low) * drawn[:, 4::2])
        heights, widths = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
        fits = (heights < size) & (widths < size)
        rows, first = np.arange(len(drawn)), fits.argmax(axis=1)
        height, width = heights[rows, first].astype(np.int64), widths[rows, first].astype(np.int64)
        erased = (drawn[:, 0] < self.p) & fits.any(axis=1) & (height > 0) & (width > 0)
        y, x = (
            scale_to_integers(drawn[:, 1 + n], 0, np.maximum(0, size - side)) for n, side in enumerate((height, width))
        )
        boxes = np.stack([y, x, height, width], axis=1) * erased[:, None]
        return np.where(erased, Operation.ERASE, Operation.NOTHING)[:, None], boxes[:, None].astype(np.float32)
