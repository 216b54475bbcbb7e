"""From a bin to an operation's amount, as torchvision's automatic augmentations count them (`_AUGMENTATION_SPACE`)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipelines.augment.operations import Operation

# RandAugment, and torchvision after it, scales the 150 pixels that AutoAugment moves an image of 331 by its size.
SHARE_MOVED = 150.0 / 331.0
UNCHANGED = np.float32(1.0)
BRIGHTEST = np.float32(255.0)
BITS = 8

# Their amount is what they change by: a factor of 1 + level.
_FACTORS = (Operation.BRIGHTNESS, Operation.SATURATION, Operation.CONTRAST, Operation.SHARPNESS)
_TRANSLATIONS = (Operation.TRANSLATE_X, Operation.TRANSLATE_Y)
_SIGNED = (Operation.SHEAR_X, Operation.SHEAR_Y, *_TRANSLATIONS, Operation.ROTATE, *_FACTORS)


@dataclass(frozen=True)
class Space:
    """How far each operation goes.

    Attributes:
        most: the level of the last bin; operations that are not in it have no level.
        bits_lost: POSTERIZE: bits taken away in the last bin.
        share_moved: a translation's `most` is in shares of the image's side, not in pixels.
    """

    most: Mapping[Operation, float]
    bits_lost: int
    share_moved: bool

    def table(self, operation: Operation, num_bins: int, size: int) -> np.ndarray:
        """The amount of every bin, positive side, (num_bins,) float32; of an operation without a level, zeros."""
        if operation is Operation.POSTERIZE:
            return BITS - np.rint(np.arange(num_bins, dtype=np.float32) / np.float32((num_bins - 1) / self.bits_lost))
        if operation is Operation.SOLARIZE:
            return BRIGHTEST * _spread(1.0, 0.0, num_bins)
        most = self.most.get(operation, 0.0)
        if operation in _TRANSLATIONS:
            return np.trunc(_spread(0.0, most * size if self.share_moved else most, num_bins))
        return _spread(0.0, most, num_bins)

    def amounts(
        self, codes: np.ndarray, bins: np.ndarray, negative: np.ndarray, num_bins: int, size: int
    ) -> np.ndarray:
        """Amounts (N, 4) float32 of (N,) codes at (N,) bins, turned around where (N,) bool `negative` says so."""
        amounts = np.zeros((len(codes), 4), np.float32)
        for code in np.unique(codes):
            operation, chosen = Operation(code), codes == code
            levels = self.table(operation, num_bins, size)[bins[chosen]]
            if operation in _SIGNED:
                levels = np.where(negative[chosen], -levels, levels)
            amounts[chosen, 0] = UNCHANGED + levels if operation in _FACTORS else levels
        return amounts


def _spread(first: float, last: float, num_bins: int) -> np.ndarray:
    """`torch.linspace` in float32: from both ends to the middle, each value rounded once.

    The rounding decides: bin 15 of 31 of TrivialAugment's 32 pixels is 15.999999, and so 15 whole pixels.
    """
    step = float(np.float32((np.float32(last) - np.float32(first)) / np.float32(num_bins - 1)))
    bins = np.arange(num_bins)
    rising, falling = float(np.float32(first)) + step * bins, float(np.float32(last)) - step * bins[::-1]
    return np.where(bins < num_bins // 2, rising, falling).astype(np.float32)


# RandAugment's and AutoAugment's.
STANDARD = Space(
    {
        Operation.SHEAR_X: 0.3,
        Operation.SHEAR_Y: 0.3,
        Operation.TRANSLATE_X: SHARE_MOVED,
        Operation.TRANSLATE_Y: SHARE_MOVED,
        Operation.ROTATE: 30.0,
        **dict.fromkeys(_FACTORS, 0.9),
    },
    bits_lost=4,
    share_moved=True,
)
# TrivialAugment's "wide" space.
WIDE = Space(
    {
        Operation.SHEAR_X: 0.99,
        Operation.SHEAR_Y: 0.99,
        Operation.TRANSLATE_X: 32.0,
        Operation.TRANSLATE_Y: 32.0,
        Operation.ROTATE: 135.0,
        **dict.fromkeys(_FACTORS, 0.99),
    },
    bits_lost=6,
    share_moved=False,
)
# The 14 that RandAugment and TrivialAugment choose from, each as often.
CHOICES = (
    Operation.NOTHING,
    *_SIGNED,
    Operation.POSTERIZE,
    Operation.SOLARIZE,
    Operation.AUTO_CONTRAST,
    Operation.EQUALIZE,
)
