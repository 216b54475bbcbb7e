"""How several cells that answer for one object become one detection."""

import torch
import torch.nn.functional as F
from torch import Tensor


def points_nms(scores: Tensor) -> Tensor:
    """Scores (N, K, S, S), 0 where the cell above, to the left or between these two has a higher one of that class."""
    best = F.max_pool2d(scores, kernel_size=2, stride=1, padding=1)[:, :, :-1, :-1]
    return scores * (best == scores)


def matrix_nms(masks: Tensor, labels: Tensor, scores: Tensor, sigma: float) -> Tensor:
    """Scores that overlap with better masks of their class lowers, all at once (section 3.4 of the paper, Gaussian).

    The score of j is multiplied by the least exp(-sigma IoU_ij^2) / exp(-sigma IoU_i^2) over all better i of its class,
    where IoU_i is the greatest IoU of i with a better one: who is likely to go has little say.

    Args:
        masks: (n, h, w) bool.
        labels: (n,) int64.
        scores: (n,) descending.
        sigma: steepness.

    Returns:
        (n,), in the same order.
    """
    if not len(scores):
        return scores
    flat = masks.flatten(1).float()
    intersection = flat @ flat.T
    area = flat.sum(dim=1)
    union = area[:, None] + area - intersection
    related = (labels[:, None] == labels).triu(diagonal=1)
    iou = torch.where(related, intersection / union.clamp(min=1), 0)
    own = iou.amax(dim=0)[:, None]
    # Pairs without relation have an IoU of 0 and so a factor of 1 or more, and the first one's is 1: never above 1.
    decay = torch.exp(-sigma * (iou.square() - own.square()))
    return scores * decay.amin(dim=0)
