"""Which cells of which grid learn which object (section 3.3.1 of SOLO, https://arxiv.org/abs/1912.04488)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.instances import Instances


class Assignment(NamedTuple):
    """The cells of all grids in a row, level by level and row by row: C of them.

    Attributes:
        labels: (C,) int64, each cell's class; -1 for background. Of several objects the last one counts.
        cells: (P,) int64 into C, the cell that draws the mask of `instances`; one cell may have several objects.
        instances: (P,) int64 into the image's objects.
    """

    labels: Tensor
    cells: Tensor
    instances: Tensor


def assign(
    target: Instances,
    size: tuple[int, int],
    grids: Sequence[int],
    scale_ranges: Sequence[Sequence[float]],
    centre_sigma: float,
) -> Assignment:
    """Cells that the middle of an object touches, on the levels made for its size; at most 3 x 3 around its centre.

    The centre is the mask's centre of mass, the middle `centre_sigma` of the box's height and width around it. Objects
    whose mask is empty have no cells.

    Args:
        target: of one image, with masks.
        size: (height, width) of the padded input: the grids span all of it, padding too.
        grids: cells along a side, level by level.
        scale_ranges: (least, greatest) sqrt(width * height) of the boxes of each level, inclusive.
        centre_sigma: 0 .. 1.
    """
    device = target.boxes.device
    grid = torch.tensor(grids, device=device)
    bounds = torch.tensor(scale_ranges, dtype=torch.float64, device=device)
    box_sides = (target.boxes[:, 2:] - target.boxes[:, :2]).double()
    scale = box_sides.prod(dim=1).sqrt()
    centres, area = _centres(target.masks)
    hit = (scale >= bounds[:, :1]) & (scale <= bounds[:, 1:]) & (area > 0)

    # (L, k, 3): the rows, and the columns, around each centre on each level, and whether the middle touches them.
    (rows, row_touched), (columns, column_touched) = (
        _around(centres[:, axis], box_sides[:, 1 - axis] * centre_sigma / 2, size[axis], grid) for axis in (0, 1)
    )
    chosen = hit[:, :, None, None] & row_touched[:, :, :, None] & column_touched[:, :, None, :]
    level, instances, row, column = chosen.nonzero(as_tuple=True)
    begins = grid.square().cumsum(0) - grid.square()
    cells = begins[level] + rows[level, instances, row] * grid[level] + columns[level, instances, column]

    owner = torch.full((sum(side * side for side in grids),), -1, device=device)
    owner = owner.scatter_reduce(0, cells, instances, "amax")
    # Owner -1 takes the last one.
    labels = torch.cat([target.labels, target.labels.new_full((1,), -1)])[owner]
    return Assignment(labels, cells, instances)


def quarter_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks at a quarter of the padded input's size, as bilinear resizing of them, rounded, would give.

    A bilinear sample at a quarter of the size is the mean of the middle 2 x 2 of each 4 x 4 pixels; half is enough.

    Args:
        masks: (k, h, w) uint8 0 or 1 of the image's content.
        size: (H, W) of the padded input, multiples of 4.

    Returns:
        (k, H / 4, W / 4) uint8.
    """
    H, W = size
    h, w = masks.shape[1:]
    # To whole blocks of 4 only: padding all to the input's size would cost 16 times the result.
    padded = F.pad(masks, (0, -w % 4, 0, -h % 4))
    middle = (padded[:, 1::4, 1::4] + padded[:, 1::4, 2::4] + padded[:, 2::4, 1::4] + padded[:, 2::4, 2::4] >= 2).to(
        torch.uint8
    )
    return F.pad(middle, (0, W // 4 - middle.shape[2], 0, H // 4 - middle.shape[1]))


def _centres(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of mass (k, 2) float64 as (y, x), pixel 0 lying at 0; and areas (k,) in pixels."""
    area = masks.sum(dim=(1, 2))
    places = [torch.arange(side, device=masks.device) for side in masks.shape[1:]]
    moments = [(masks.sum(dim=2 - axis) * place).sum(dim=1) for axis, place in enumerate(places)]
    return torch.stack(moments, dim=1) / area.clamp(min=1)[:, None].double(), area


def _around(centre: Tensor, half: Tensor, side: int, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Along one axis: the cells (L, k, 3) before, at and after the centre's, and whether the middle touches them."""

    def cell(place: Tensor) -> Tensor:
        return torch.floor(place * grid[:, None] / side).long()

    first = cell(centre - half).clamp(min=0)
    last = torch.minimum(cell(centre + half), grid[:, None] - 1)
    cells = cell(centre)[:, :, None] + torch.tensor([-1, 0, 1], device=centre.device)
    return cells, (cells >= first[:, :, None]) & (cells <= last[:, :, None])
