"""PCA lighting: noise along the principal components of ImageNet's colours (Krizhevsky et al., NIPS 2012, section 4.1).

The components are those published with the ResNet training code of Gross and Wilber (fb.resnet.torch, 2016), for R, G
and B on a scale of 0 to 1.
"""

from dataclasses import dataclass

import numpy as np

from pipelines.augment.operations import Operation
from pipelines.errors import LorotError
from pipelines.randomness import uniform

EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
# Columns are the components.
EIGENVECTORS = np.array(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ]
)


@dataclass(frozen=True)
class Augmentation:
    """Each component times its eigenvalue times a normal number is added to all pixels, rounded to 8 bits.

    Attributes:
        std: standard deviation of the normal numbers.
    """

    std: float = 0.1

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise LorotError(f"lighting std {self.std}: needs more than 0, as 0.1")

    @property
    def slots(self) -> tuple[frozenset[Operation], ...]:
        """One, always the same."""
        return (frozenset([Operation.LIGHTING]),)

    def sample(self, seed: int, epochs: int | np.ndarray, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes (N, 1) int64 and amounts (N, 1, 4) float32."""
        drawn = uniform(seed, epochs, ids, "lighting", num=6)
        # Box and Muller, "A note on the generation of random normal deviates", 1958.
        normal = np.sqrt(-2 * np.log1p(-drawn[:, :3])) * np.cos(2 * np.pi * drawn[:, 3:])
        amounts = np.zeros((len(ids), 1, 4), np.float32)
        # Summed in one fixed order: a matrix product may round differently in another batch.
        parts = 255 * self.std * normal[:, None, :] * (EIGENVECTORS * EIGENVALUES)
        amounts[:, 0, :3] = parts[:, :, 0] + parts[:, :, 1] + parts[:, :, 2]
        return np.full((len(ids), 1), Operation.LIGHTING, np.int64), amounts
