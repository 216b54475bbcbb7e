"""Which cells learn which object: two hand-worked images, and the rule's definition, cell by cell, as the oracle."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from service.models.solov2.assignment import assign, quarter_masks
from service.models.solov2.options import Options
from tests.service.drawn_objects import draw, instances, nothing


def _rectangle(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_two_objects_by_hand() -> None:
    # Cells of 16 px (4 x 4 of them: 0 .. 15), then of 32 px (2 x 2: 16 .. 19).
    small = _rectangle((64, 64), 16, 0, 32, 16)  # centre (23.5, 7.5), its middle reaches 1.6 px each way
    large = _rectangle((64, 64), 8, 8, 56, 56)  # centre (31.5, 31.5), its middle reaches 4.8 px each way
    assigned = assign(instances(np.stack([small, large]), [7, 3]), (64, 64), (4, 2), ((1, 32), (16, 64)), 0.2)
    # The small one, of size 16, is for both levels; the large one, of size 48, for the second, where it touches all.
    assert assigned.cells.tolist() == [4, 16, 16, 17, 18, 19]
    assert assigned.instances.tolist() == [0, 0, 1, 1, 1, 1]
    # Cell 16 has both objects and the later one's class.
    assert assigned.labels.tolist() == [-1] * 4 + [7] + [-1] * 11 + [3] * 4


def test_the_grid_spans_the_padding_too() -> None:
    mask = _rectangle((40, 40), 20, 20, 40, 40)  # centre (29.5, 29.5)
    target = instances(mask[None], [0])
    assert assign(target, (64, 128), (4,), ((1, 99),), 0.0).cells.tolist() == [4 * 1 + 0]
    assert assign(target, (64, 64), (4,), ((1, 99),), 0.0).cells.tolist() == [4 * 1 + 1]


def test_the_centre_is_the_masks_and_not_the_boxs() -> None:
    mask = _rectangle((64, 64), 0, 0, 32, 4)
    mask[31, 31] = True
    assert assign(instances(mask[None], [0]), (64, 64), (4,), ((1, 99),), 0.0).cells.tolist() == [0]


def test_a_wide_middle_reaches_no_further_than_the_neighbouring_cells() -> None:
    mask = np.ones((64, 64), bool)
    cells = assign(instances(mask[None], [0]), (64, 64), (8,), ((1, 99),), 1.0).cells
    # The centre's cell is 3, 3.
    assert cells.tolist() == [8 * row + column for row in (2, 3, 4) for column in (2, 3, 4)]


def test_both_ends_of_a_scale_range_belong_to_it() -> None:
    target = instances(_rectangle((64, 64), 0, 0, 16, 16)[None], [0])
    ranges = ((1, 15.9), (1, 16), (16, 20), (16.1, 20))
    assert assign(target, (64, 64), (1, 1, 1, 1), ranges, 0.2).labels.tolist() == [-1, 0, 0, -1]


def test_an_object_with_an_empty_mask_and_an_image_without_objects_have_no_cells() -> None:
    target = instances(np.ones((1, 64, 64), bool), [0])
    for none in (target._replace(masks=torch.zeros_like(target.masks)), nothing(), nothing((64, 64))):
        assigned = assign(none, (64, 64), (4, 2), ((1, 99), (1, 99)), 0.2)
        assert len(assigned.cells) == len(assigned.instances) == 0
        assert assigned.labels.tolist() == [-1] * 20
        assert quarter_masks(none.masks, (64, 64)).shape == (len(none.boxes), 16, 16)


@pytest.mark.parametrize("seed", range(4))
def test_cells_are_those_that_the_definition_names(seed: int) -> None:
    # Objects of 80 to 130 px in an image of 260 x 250 px, padded to 288 x 320.
    _, (target,) = draw(1, side=260, seed=seed)
    target = target._replace(masks=target.masks[:, :, :250])
    size, options = (288, 320), Options()
    assigned = assign(target, size, options.grids, options.scale_ranges, 0.2)
    expected = set()
    begin = 0
    for grid, (least, greatest) in zip(options.grids, options.scale_ranges, strict=True):
        for index, (box, mask) in enumerate(zip(target.boxes.tolist(), target.masks.numpy(), strict=True)):
            width, height = box[2] - box[0], box[3] - box[1]
            if not least <= (width * height) ** 0.5 <= greatest:
                continue
            centre = ndimage.center_of_mass(mask)
            for row in range(grid):
                for column in range(grid):
                    near = [
                        abs(place - int(middle * grid / side)) <= 1
                        and place * side / grid <= middle + 0.1 * extent
                        and (place + 1) * side / grid > middle - 0.1 * extent
                        for place, middle, side, extent in zip(
                            (row, column), centre, size, (height, width), strict=True
                        )
                    ]
                    if all(near):
                        expected.add((begin + row * grid + column, index))
        begin += grid * grid
    pairs = list(zip(assigned.cells.tolist(), assigned.instances.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected
    last = {}
    for cell, index in sorted(expected, key=lambda pair: pair[1]):
        last[cell] = int(target.labels[index])
    assert assigned.labels.tolist() == [last.get(cell, -1) for cell in range(begin)]


def test_quarter_masks_are_bilinear_resizing_rounded() -> None:
    masks = (torch.rand(5, 61, 90, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.uint8)
    padded = F.pad(masks, (0, 6, 0, 3)).float()
    expected = F.interpolate(padded[None], scale_factor=0.25, mode="bilinear", align_corners=False)[0] >= 0.5
    quarter = quarter_masks(masks, (64, 96))
    assert quarter.dtype == torch.uint8
    assert torch.equal(quarter.bool(), expected)
