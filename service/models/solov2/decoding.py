"""From class scores, kernels and mask features of one image to its objects."""

import torch
from torch import Tensor

from service.models.detections import Detections, SoftMasks
from service.models.solov2.branches import convolve_dynamically
from service.models.solov2.options import Options
from service.models.solov2.suppression import matrix_nms

# Pixels of the input to one of the mask features.
_STRIDE = 4


def decode(
    scores: Tensor, kernels: Tensor, features: Tensor, strides: Tensor, size: tuple[int, int], options: Options
) -> Detections:
    """Objects by descending score, the class's times the mask's mean probability, lowered by the matrix NMS.

    Args:
        scores: (C, num_classes) of all cells after points NMS, in 0 .. 1.
        kernels: (C, E).
        features: (E, h, w), at a quarter of the padded input.
        strides: (C,) of the levels; a mask needs more pixels (of a quarter) than that.
        size: (height, width) of the content.
        options: thresholds.
    """
    cells, labels = (scores > options.score_thresh).nonzero(as_tuple=True)
    best = scores[cells, labels].argsort(descending=True, stable=True)[: options.max_candidates]
    cells, labels = cells[best], labels[best]
    probabilities = convolve_dynamically(kernels[cells], features).sigmoid()
    masks = probabilities > options.mask_thresh
    area = masks.sum(dim=(1, 2))
    certainty = (probabilities * masks).sum(dim=(1, 2)) / area.clamp(min=1)
    score = scores[cells, labels] * certainty

    large = (area > strides[cells]).nonzero().flatten()
    order = large[score[large].argsort(descending=True, stable=True)[: options.nms_pre]]
    lowered = matrix_nms(masks[order], labels[order], score[order], options.nms_sigma)
    kept = lowered >= options.update_thresh
    order, lowered = order[kept], lowered[kept]
    best = lowered.argsort(descending=True, stable=True)[: options.max_per_image]
    masks = SoftMasks(probabilities[order[best]], _STRIDE, options.mask_thresh).all_drawn(size)
    # What lies in the padding alone is no object of the image.
    seen = masks.flatten(1).any(dim=1)
    masks, best = masks[seen], best[seen]
    soft = SoftMasks(probabilities[order[best]], _STRIDE, options.mask_thresh)
    return Detections(boxes_around(masks), lowered[best], labels[order[best]], masks, soft)


def boxes_around(masks: Tensor) -> Tensor:
    """Tight half-open boxes: (k, h, w) bool, none empty -> (k, 4) float32 x_min, y_min, x_max, y_max."""
    rows, columns = masks.any(dim=2).byte(), masks.any(dim=1).byte()
    # The first of several maxima is what argmax gives.
    low = [side.argmax(dim=1) for side in (columns, rows)]
    high = [side.shape[1] - side.flip(1).argmax(dim=1) for side in (columns, rows)]
    return torch.stack([*low, *high], dim=1).float()
