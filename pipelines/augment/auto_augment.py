"""AutoAugment: one of the 25 pairs of operations that were found for ImageNet (Cubuk et al., CVPR 2019, table 9)."""

from dataclasses import dataclass

import numpy as np

from pipelines.augment.levels import STANDARD
from pipelines.augment.operations import Operation
from pipelines.errors import LorotError
from pipelines.randomness import scale_to_integers, uniform

_LEVELS = 10
_AUTO, _EQUAL, _INVERT = Operation.AUTO_CONTRAST, Operation.EQUALIZE, Operation.INVERT
_COLOUR, _CONTRAST, _SHARP = Operation.SATURATION, Operation.CONTRAST, Operation.SHARPNESS
_POSTER, _SOLAR = Operation.POSTERIZE, Operation.SOLARIZE
_ROTATE, _SHEAR = Operation.ROTATE, Operation.SHEAR_X

# Two operations, each with its probability and level; the level of one that has none is 0.
POLICY = (
    ((_POSTER, 0.4, 8), (_ROTATE, 0.6, 9)),
    ((_SOLAR, 0.6, 5), (_AUTO, 0.6, 0)),
    ((_EQUAL, 0.8, 0), (_EQUAL, 0.6, 0)),
    ((_POSTER, 0.6, 7), (_POSTER, 0.6, 6)),
    ((_EQUAL, 0.4, 0), (_SOLAR, 0.2, 4)),
    ((_EQUAL, 0.4, 0), (_ROTATE, 0.8, 8)),
    ((_SOLAR, 0.6, 3), (_EQUAL, 0.6, 0)),
    ((_POSTER, 0.8, 5), (_EQUAL, 1.0, 0)),
    ((_ROTATE, 0.2, 3), (_SOLAR, 0.6, 8)),
    ((_EQUAL, 0.6, 0), (_POSTER, 0.4, 6)),
    ((_ROTATE, 0.8, 8), (_COLOUR, 0.4, 0)),
    ((_ROTATE, 0.4, 9), (_EQUAL, 0.6, 0)),
    ((_EQUAL, 0.0, 0), (_EQUAL, 0.8, 0)),
    ((_INVERT, 0.6, 0), (_EQUAL, 1.0, 0)),
    ((_COLOUR, 0.6, 4), (_CONTRAST, 1.0, 8)),
    ((_ROTATE, 0.8, 8), (_COLOUR, 1.0, 2)),
    ((_COLOUR, 0.8, 8), (_SOLAR, 0.8, 7)),
    ((_SHARP, 0.4, 7), (_INVERT, 0.6, 0)),
    ((_SHEAR, 0.6, 5), (_EQUAL, 1.0, 0)),
    ((_COLOUR, 0.4, 0), (_EQUAL, 0.6, 0)),
    ((_EQUAL, 0.4, 0), (_SOLAR, 0.2, 4)),
    ((_SOLAR, 0.6, 5), (_AUTO, 0.6, 0)),
    ((_INVERT, 0.6, 0), (_EQUAL, 1.0, 0)),
    ((_COLOUR, 0.6, 4), (_CONTRAST, 1.0, 8)),
    ((_EQUAL, 0.8, 0), (_EQUAL, 0.6, 0)),
)
_CODES = np.array([[code for code, _, _ in pair] for pair in POLICY], np.int64)
_PROBABILITIES = np.array([[probability for _, probability, _ in pair] for pair in POLICY])
_BINS = np.array([[level for _, _, level in pair] for pair in POLICY], np.int64)


@dataclass(frozen=True)
class Augmentation:
    """As torchvision's AutoAugment with its default interpolation and fill.

    Attributes:
        policy: "imagenet", the only one.
    """

    policy: str = "imagenet"

    def __post_init__(self) -> None:
        if self.policy != "imagenet":
            raise LorotError(f"auto_augment policy {self.policy!r} does not exist; there is imagenet")

    @property
    def slots(self) -> tuple[frozenset[Operation], ...]:
        """The first and the second of each pair."""
        first, second = (frozenset(Operation(code) for code in column) for column in _CODES.T)
        return first, second

    def sample(self, seed: int, epochs: int | np.ndarray, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes (N, 2) int64 and amounts (N, 2, 4) float32."""
        drawn = uniform(seed, epochs, ids, "auto_augment", num=5)
        pairs = scale_to_integers(drawn[:, 0], 0, len(POLICY) - 1)
        codes = np.where(drawn[:, 1:3] < _PROBABILITIES[pairs], _CODES[pairs], Operation.NOTHING)
        bins, negative = _BINS[pairs].ravel(), (drawn[:, 3:5] < 0.5).ravel()
        return codes, STANDARD.amounts(codes.ravel(), bins, negative, _LEVELS, size).reshape(len(codes), 2, 4)
