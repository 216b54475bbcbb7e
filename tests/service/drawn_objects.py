"""Images of coloured rectangles, discs and triangles, some behind others, with what a detector is told of them."""

import itertools

import numpy as np
import torch
from torch import Tensor

from pipelines.instances import Instances

CLASSES = ("rectangle", "disc", "triangle")


def draw(
    count: int, side: int, seed: int = 0, objects: int = 3, radii: tuple[float, float] = (1 / 6, 1 / 4)
) -> tuple[Tensor, list[Instances]]:
    """`count` images (count, 3, side, side), roughly normalised, and their objects, of radii in shares of a side."""
    rng = np.random.default_rng(seed)
    images, targets = [], []
    for _ in range(count):
        image, masks, labels = _one(rng, side, objects, radii)
        images.append(image + rng.normal(0, 0.05, image.shape))
        targets.append(instances(np.stack(masks), labels))
    return torch.from_numpy(np.stack(images)).float(), targets


def instances(masks: np.ndarray, labels: list[int]) -> Instances:
    """Targets of masks (k, h, w), none of them empty, with the boxes around them."""
    boxes = [
        (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) for rows, columns in (m.nonzero() for m in masks)
    ]
    return Instances(
        torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.from_numpy(masks.astype(np.uint8)),
        torch.zeros(len(labels), dtype=torch.bool),
    )


def nothing(masks: tuple[int, int] = (0, 0)) -> Instances:
    """The targets of an image without objects."""
    return Instances(
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, *masks, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.bool),
    )


def _one(
    rng: np.random.Generator, side: int, objects: int, radii: tuple[float, float]
) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    """Objects drawn one over the other, until none is hidden by more than half and no two share a place."""
    y, x = np.mgrid[:side, :side] + 0.5
    while True:
        image = np.full((3, side, side), -1.0)
        masks: list[np.ndarray] = []
        whole: list[int] = []
        centres: list[np.ndarray] = []
        labels = [int(label) for label in rng.permutation(len(CLASSES))[:objects]]
        for label in labels:
            radius = side * rng.uniform(*radii)
            centre_y, centre_x = rng.uniform(radius, side - radius, 2)
            centres.append(np.array([centre_y, centre_x]))
            up, right = y - centre_y, x - centre_x
            mask = (
                (abs(up) < radius * 0.8) & (abs(right) < radius),
                up**2 + right**2 < radius**2,
                (up < radius * 0.8) & (abs(right) < (up + radius) / 1.8),
            )[label]
            masks = [other & ~mask for other in masks] + [mask]
            whole.append(mask.sum())
            image[:, mask] = rng.uniform(0, 2, 3)[:, None]
        apart = all(abs(one - other).max() > side / 4 for one, other in itertools.combinations(centres, 2))
        if apart and all(mask.sum() > area / 2 for mask, area in zip(masks, whole, strict=True)):
            return image, masks, labels
