"""Colour jitter: brightness, contrast, saturation and hue by random amounts in random order (as torchvision's)."""

from dataclasses import dataclass

import numpy as np

from pipelines.augment.operations import Operation
from pipelines.errors import LorotError
from pipelines.randomness import uniform

_OPERATIONS = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.SATURATION, Operation.HUE)
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Augmentation:
    """As torchvision's ColorJitter with numbers as options; at 0 an operation is left out.

    The defaults are those of the ResNet training code of Gross and Wilber (fb.resnet.torch, 2016).

    Attributes:
        brightness, contrast, saturation: the factor is uniform on 1 - value (at least 0) to 1 + value.
        hue: the shift is uniform on -value to value of the colour circle, at most 0.5.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name, value in zip(("brightness", "contrast", "saturation", "hue"), self._reach, strict=True):
            if value < 0 or (name == "hue" and value > 0.5):
                limit = "0 to 0.5" if name == "hue" else "0 or more"
                raise LorotError(f"color_jitter {name} {value}: needs {limit}")
        if not any(self._reach):
            raise LorotError("color_jitter changes nothing: set brightness, contrast, saturation or hue above 0")

    @property
    def _reach(self) -> tuple[float, float, float, float]:
        return self.brightness, self.contrast, self.saturation, self.hue

    @property
    def slots(self) -> tuple[frozenset[Operation], ...]:
        """Any of those that are not left out, as often as there are."""
        used = frozenset(code for code, value in zip(_OPERATIONS, self._reach, strict=True) if value)
        return (used,) * len(used)

    def sample(self, seed: int, epochs: int | np.ndarray, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes (N, K) int64 and amounts (N, K, 4) float32, for the K operations that are not left out."""
        drawn = uniform(seed, epochs, ids, "color_jitter", num=8)
        used = np.flatnonzero(self._reach)
        # The order of uniforms is a uniform permutation, of some of them as of all.
        order = used[drawn[:, used].argsort(axis=1)]
        neutral, reach = np.array(_NEUTRAL), np.array(self._reach)
        lowest = np.where(neutral > 0, np.maximum(0.0, neutral - reach), -reach)
        values = lowest + (neutral + reach - lowest) * drawn[:, 4:]
        amounts = np.zeros((len(ids), len(used), 4), np.float32)
        amounts[:, :, 0] = np.take_along_axis(values, order, axis=1)
        return np.array(_OPERATIONS, np.int64)[order], amounts
