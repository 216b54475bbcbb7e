"""Class activation maps (Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Enlargement = Literal["bilinear", "bicubic"]


def class_activation_maps(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """How much each place of the last feature maps speaks for a class (eq. 2 of the paper).

    The mean of a map plus the classifier's bias is the class's logit.

    Args:
        features: (N, C, h, w) maps before the global average pooling.
        weight: (K, C) of the linear classifier behind the pooling.
        classes: (N,) int64, one class an image.

    Returns:
        (N, h, w).
    """
    return torch.einsum("nchw,nc->nhw", features, weight[classes])


def smoothed(maps: Tensor) -> Tensor:
    """Maps (N, h, w) after a 3 x 3 box filter that finds zeros outside the map."""
    return F.avg_pool2d(maps[:, None], 3, stride=1, padding=1, count_include_pad=True)[:, 0]


def heatmaps(maps: Tensor, size: int, enlargement: Enlargement = "bilinear") -> Tensor:
    """Maps (N, h, w) enlarged to (N, size, size), then stretched to 0 .. 1 image by image.

    The stretching comes second, so that every map's maximum is exactly 1 and a threshold is a share of it. A map
    without contrast points nowhere in particular: it becomes 1 everywhere.
    """
    maps = maps.float()
    _, h, w = maps.shape
    # As two small matrix products this takes a tenth of the time of F.interpolate, which gives the same numbers.
    down, across = (interpolation(size, cells, maps.device, enlargement) for cells in (h, w))
    enlarged = down @ maps @ across.T
    low = enlarged.amin(dim=(1, 2), keepdim=True)
    spread = enlarged.amax(dim=(1, 2), keepdim=True) - low
    flat = maps.amax(dim=(1, 2), keepdim=True) == maps.amin(dim=(1, 2), keepdim=True)
    return ((enlarged - low) / spread.masked_fill(flat, 1)).masked_fill_(flat, 1)


def interpolation(size: int, cells: int, device: torch.device, enlargement: Enlargement = "bilinear") -> Tensor:
    """(size, cells) weights of the cells in interpolation to `size` pixels, pixel centres at half integers."""
    # Each channel is one cell's share, in a picture one pixel wide: along that side nothing is interpolated.
    one_hot = torch.eye(cells, device=device)[None, :, :, None]
    return F.interpolate(one_hot, size=(size, 1), mode=enlargement, align_corners=False)[0, :, :, 0].T
