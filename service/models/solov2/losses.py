"""What SOLOv2 minimises: focal loss over all cells, dice loss over the masks of cells with an object."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from service.models.solov2.assignment import Assignment
from service.models.solov2.branches import convolve_dynamically


def dice_loss(probabilities: Tensor, targets: Tensor) -> Tensor:
    """1 - 2 p.t / (p.p + t.t) of each row, eq. 6 of SOLO: (P, M) and (P, M) in 0 .. 1 -> (P,)."""
    overlap = (probabilities * targets).sum(dim=1)
    # The published constants: 0.001 with each square.
    squares = probabilities.square().sum(dim=1) + targets.square().sum(dim=1) + 0.002
    return 1 - 2 * overlap / squares


def class_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of all cells, divided by the number of those with an object, plus one as published.

    Args:
        logits: (N, C, num_classes) float32.
        labels: (N, C) int64, -1 for background.
    """
    wanted = F.one_hot(labels + 1, logits.shape[2] + 1)[..., 1:].to(logits.dtype)
    total = sigmoid_focal_loss(logits, wanted, alpha=alpha, gamma=gamma, reduction="sum")
    return total / ((labels >= 0).sum() + 1)


def mask_loss(kernels: Tensor, features: Tensor, assignments: Sequence[Assignment], masks: Sequence[Tensor]) -> Tensor:
    """Mean dice loss over all (cell, object) pairs of the batch; 0, with a gradient of zeros, if there are none.

    Args:
        kernels: (N, C, E) float32.
        features: (N, E, h, w) float32.
        assignments: N.
        masks: N times (k, h, w) uint8.
    """
    each = [
        dice_loss(
            convolve_dynamically(kernels[image, assigned.cells], features[image]).sigmoid().flatten(1),
            truth[assigned.instances].flatten(1),
        )
        for image, (assigned, truth) in enumerate(zip(assignments, masks, strict=True))
    ]
    losses = torch.cat(each)
    # No mean: that of nothing is no number, and the sum of nothing still leads back to every parameter.
    return losses.sum() / max(1, len(losses))
