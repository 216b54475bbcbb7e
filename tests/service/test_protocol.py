"""The two ways from a map to a box, the published one against a slow rendering of what that code does."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import measure
from torch.nn import functional as F

from service.downstream import boxes
from service.downstream.protocol import OFFICIAL, PAPER, PROTOCOLS, choose
from service.downstream.scores import CAM_THRESHOLDS
from service.errors import ConfigError


def some_maps(count: int, cells: int = 7) -> torch.Tensor:
    return torch.randn(count, cells, cells, generator=torch.Generator().manual_seed(11))


def published_box(coarse: torch.Tensor, size: int, threshold: float) -> tuple[int, ...]:
    """One map by Co-mixup's steps: sum of nine cells, bicubic, 8 bits, strictly above, the contour of largest area."""
    summed = F.conv2d(coarse[None, None], torch.ones(1, 1, 3, 3), padding=1)
    heat = F.interpolate(summed, size=[size, size], mode="bicubic")[0, 0].numpy()
    grey = np.clip((heat - heat.min()) / (heat.max() - heat.min()) * 255, 0, 255).astype(np.uint8)
    mask = grey > int(threshold * grey.max())
    best, most = (0, 0, 0, 0), -1.0
    for region in measure.regionprops(measure.label(mask, connectivity=2)):
        filled = np.pad(ndimage.binary_fill_holes(region.image), 1)
        pixels = ndimage.convolve(filled.astype(int), np.ones((2, 2), int), mode="constant")
        area = float((pixels == 4).sum() + 0.5 * (pixels == 3).sum())
        if area > most:
            y_min, x_min, y_max, x_max = region.bbox
            best, most = (x_min, y_min, x_max, y_max), area
    return best


def test_official_boxes_are_those_of_the_published_steps() -> None:
    maps = some_maps(6)
    found = OFFICIAL.boxes(OFFICIAL.maps(maps).numpy(), 96, CAM_THRESHOLDS)
    for coarse, row in zip(maps, found, strict=True):
        for threshold, box in zip(CAM_THRESHOLDS, row, strict=True):
            assert tuple(box) == published_box(coarse, 96, float(threshold))


def test_the_protocols_find_different_boxes() -> None:
    maps = some_maps(6)
    found = {
        name: protocol.boxes(protocol.maps(maps).numpy(), 96, CAM_THRESHOLDS) for name, protocol in PROTOCOLS.items()
    }
    assert (found["paper"] != found["official"]).any(axis=2).mean() > 0.5


def test_8_bit_thresholds_are_exceeded_and_not_only_reached() -> None:
    heat = np.arange(256, dtype=np.float32)[None, None] / np.float32(255)
    for threshold in (0.05, 0.2, 0.5, 0.95):
        ((box,),) = boxes.largest_component_boxes(heat, OFFICIAL.cuts(np.array([threshold])))
        assert box[0] == int(threshold * 255) + 1
    np.testing.assert_array_equal(PAPER.cuts(CAM_THRESHOLDS), CAM_THRESHOLDS)


def test_true_boxes_count_whole_or_cut_to_what_the_network_saw() -> None:
    # The network saw the right half of a source 80 wide, at half its size; the true box covers all of it but 10 rows.
    window = np.array([[0, 40, 40, 40]])
    truth = [np.array([[0.0, 10.0, 80.0, 40.0]])]
    found = np.array([[[0, 5, 20, 20]]])  # all that was visible of it
    assert PAPER.overlap(found, truth, window, 20)[0, 0] == pytest.approx(0.5)
    assert OFFICIAL.overlap(found, truth, window, 20)[0, 0] == 1.0
    # At half its size a box from 41 to 61 begins at half a pixel and ends at one: both are rounded down.
    odd = [np.array([[41.0, 11.0, 61.0, 31.0]])]
    assert OFFICIAL.overlap(np.array([[[0, 5, 10, 15]]]), odd, window, 20)[0, 0] == 1.0
    hidden = [np.array([[0.0, 0.0, 30.0, 40.0]])]
    assert OFFICIAL.overlap(found, hidden, window, 20)[0, 0] == 0.0


def test_the_centre_box_is_scored_against_what_found_boxes_are_scored_against() -> None:
    # Of a source 80 x 40 the network saw the middle 40 x 40; the true box is all of that, and 10 columns either side.
    heights, widths, window = np.array([40]), np.array([80]), np.array([[0, 20, 40, 40]])
    truth, shares = [np.array([[10.0, 0.0, 70.0, 40.0]])], np.array([0.5, 1.0])
    whole = PAPER.centre_overlap(shares, heights, widths, truth, window, 20)
    np.testing.assert_allclose(whole, [[40 * 20 / (60 * 40), 60 * 40 / (80 * 40)]])
    seen = OFFICIAL.centre_overlap(shares, heights, widths, truth, window, 20)
    np.testing.assert_allclose(seen, [[0.25, 1.0]])
    # A found box that is the centre box gets the same, whichever protocol.
    same = np.array([[[5, 5, 15, 15], [0, 0, 20, 20]]])
    np.testing.assert_allclose(OFFICIAL.overlap(same, truth, window, 20), seen)
    everything = np.array([[0, 0, 40, 80]])
    np.testing.assert_allclose(PAPER.overlap(same, truth, everything, 20), whole)


def test_disjoint_boxes_get_nothing_where_an_unclamped_iou_would_give_all() -> None:
    # Apart in both directions: (-10) * (-10) pixels over 10 * 10 + 10 * 10 - 100 would be 1.
    found, truth = np.array([[[0, 0, 10, 10]]]), [np.array([[20.0, 20.0, 30.0, 30.0]])]
    for protocol in PROTOCOLS.values():
        assert protocol.overlap(found, truth, np.array([[0, 0, 40, 40]]), 40)[0, 0] == 0.0


def test_a_protocol_is_chosen_by_name_with_any_kind_of_component() -> None:
    assert choose() is PAPER
    assert choose("official").component == "contours"
    assert choose("paper", "contours").component == "contours"
    assert choose("official", "pixels").smoothed
    with pytest.raises(ConfigError, match="there are paper, official"):
        choose("published")
    with pytest.raises(ConfigError, match="there are pixels, contours"):
        choose("paper", "blobs")
