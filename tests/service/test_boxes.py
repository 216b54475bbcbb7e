"""Boxes from heat maps against a flood fill, scipy's labelling and torchvision's box_iou."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage
from torchvision.ops import box_iou

from service.downstream import boxes


def flood_filled_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The slow way: fill every 8-connected component from its first pixel, keep the first of the largest."""
    unseen = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    largest: list[tuple[int, int]] = []
    for pixel in sorted(unseen):
        if pixel not in unseen:
            continue
        unseen.remove(pixel)
        filled, front = [pixel], [pixel]
        while front:
            y, x = front.pop()
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in unseen:
                    unseen.remove(near)
                    filled.append(near)
                    front.append(near)
        largest = max(largest, filled, key=len)
    if not largest:
        return (0, 0, 0, 0)
    y, x = zip(*largest, strict=True)
    return (min(x), min(y), max(x) + 1, max(y) + 1)


@settings(max_examples=150, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=3, max_dims=3, max_side=7),
        elements=st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    )
)
def test_boxes_surround_the_component_a_flood_fill_finds_largest(heatmaps: np.ndarray) -> None:
    thresholds = np.array([0.1, 0.4, 0.7, 1.0])
    found = boxes.largest_component_boxes(heatmaps, thresholds)
    assert found.shape == (len(heatmaps), 4, 4)
    for heatmap, row in zip(heatmaps, found, strict=True):
        for threshold, box in zip(thresholds.astype(np.float32), row, strict=True):
            assert tuple(box) == flood_filled_box(heatmap >= threshold)


def test_boxes_of_enlarged_maps_equal_scipys_labelling() -> None:
    coarse = torch.rand(12, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    heatmaps = torch.nn.functional.interpolate(coarse, size=(56, 48), mode="bilinear")[:, 0].numpy()
    thresholds = np.arange(1, 20) / 20
    found = boxes.largest_component_boxes(heatmaps, thresholds)
    for heatmap, row in zip(heatmaps, found, strict=True):
        for threshold, box in zip(thresholds.astype(np.float32), row, strict=True):
            parts, _ = ndimage.label(heatmap >= threshold, structure=np.ones((3, 3)))
            sizes = np.bincount(parts.ravel(), minlength=2)[1:]
            place = ndimage.find_objects(parts)
            expected = (0, 0, 0, 0)
            if place:
                rows, columns = place[int(sizes.argmax())]
                expected = (columns.start, rows.start, columns.stop, rows.stop)
            assert tuple(box) == expected


def test_the_blocks_that_maps_are_worked_on_in_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    heatmaps = np.random.default_rng(3).random((7, 9, 11)).astype(np.float32)
    thresholds = np.array([0.3, 0.6, 0.9])
    at_once = boxes.largest_component_boxes(heatmaps, thresholds)
    for pixels in (1, 2 * 99, 3 * 99):
        monkeypatch.setattr(boxes, "_BLOCK_PIXELS", pixels)
        np.testing.assert_array_equal(boxes.largest_component_boxes(heatmaps, thresholds), at_once)


def test_a_component_is_largest_by_its_pixels_and_not_by_its_box() -> None:
    heatmap = np.zeros((1, 8, 8), np.float32)
    heatmap[0, 0, 0:8] = 1  # 8 pixels in a long box, with a tail: 11 pixels in a box of 32
    heatmap[0, 1:4, 0] = 1
    heatmap[0, 5:8, 4:8] = 1  # 12 pixels in a box of 12
    assert boxes.largest_component_boxes(heatmap, np.array([0.5])).tolist() == [[[4, 5, 8, 8]]]


def test_a_map_without_a_pixel_at_the_threshold_has_an_empty_box() -> None:
    assert boxes.largest_component_boxes(np.zeros((2, 3, 3), np.float32), np.array([0.5])).tolist() == [[[0] * 4]] * 2


def some_boxes(count: int, seed: int) -> np.ndarray:
    corners = np.random.default_rng(seed).uniform(0, 50, (count, 2, 2))
    corners.sort(axis=1)
    return corners.reshape(count, 4)


def test_iou_equals_torchvisions_best_over_the_true_boxes() -> None:
    found = some_boxes(4 * 6, 1).reshape(4, 6, 4)
    truths = [some_boxes(count, count) for count in (1, 3, 2, 5)]
    ours = boxes.best_iou(found, truths)
    for box, truth, iou in zip(found, truths, ours, strict=True):
        expected = box_iou(torch.from_numpy(box), torch.from_numpy(truth)).max(dim=1).values
        np.testing.assert_allclose(iou, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("box", "truth", "expected"),
    [
        ((0, 0, 4, 4), (0, 0, 4, 4), 1.0),
        ((0, 0, 4, 4), (2, 0, 6, 4), 1 / 3),
        ((0, 0, 4, 4), (4, 0, 8, 4), 0.0),  # half-open boxes that touch share no pixel
        ((0, 0, 1, 1), (9, 9, 10, 10), 0.0),  # apart in both directions: unclamped, (-8) * (-8) pixels would overlap
        ((0, 0, 0, 0), (0, 0, 0, 0), 0.0),
    ],
)
def test_iou_of_hand_worked_pairs(box: tuple, truth: tuple, expected: float) -> None:
    assert boxes.best_iou(np.array([[box]]), [np.array([truth])])[0, 0] == pytest.approx(expected)


def test_an_image_without_true_boxes_has_no_overlap() -> None:
    found = np.array([[[0, 0, 4, 4]], [[0, 0, 4, 4]]])
    assert boxes.best_iou(found, [np.zeros((0, 4)), np.array([[0, 0, 4, 4]])]).tolist() == [[0.0], [1.0]]
    assert boxes.best_iou(found, [np.zeros((0, 4))] * 2).tolist() == [[0.0], [0.0]]


def test_a_box_maps_to_the_source_through_its_window() -> None:
    # A source 200 wide and 100 high whose centre square of 80 became an input of 40: two source pixels a pixel.
    windows = np.array([[10, 60, 80, 80], [0, 0, 100, 200]])
    found = np.array([[[0, 0, 40, 40], [10, 5, 20, 40]], [[0, 0, 40, 40], [10, 5, 20, 40]]])
    assert boxes.to_source(found, windows, 40).tolist() == [
        [[60, 10, 140, 90], [80, 20, 100, 90]],
        [[0, 0, 200, 100], [50, 12.5, 100, 100]],
    ]


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.integers(-20, 300)] * 2, *[st.integers(1, 500)] * 2), st.integers(1, 300), st.integers(0, 9999))
def test_mapping_to_the_source_and_back_is_the_identity(window: tuple, size: int, seed: int) -> None:
    found = some_boxes(3, seed)[None]
    back = boxes.to_view(boxes.to_source(found, np.array([window]), size), np.array([window]), size)
    np.testing.assert_allclose(back, found, atol=1e-9)


def test_centre_boxes_lie_in_the_middle_and_keep_the_images_aspect() -> None:
    found = boxes.centre_boxes(np.array([100, 60]), np.array([200, 60]), np.array([0.5, 1.0]))
    assert found.tolist() == [[[50, 25, 150, 75], [0, 0, 200, 100]], [[15, 15, 45, 45], [0, 0, 60, 60]]]
