"""Boxes from heat maps against a flood fill, scipy's and scikit-image's labelling, and torchvision's box_iou."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage
from skimage import measure
from torchvision.ops import box_iou

from service.downstream import boxes, cam


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


def test_a_component_is_largest_by_its_pixels_and_not_by_its_box() -> None:
    heatmap = np.zeros((1, 8, 8), np.float32)
    heatmap[0, 0, 0:8] = 1  # 8 pixels in a long box, with a tail: 11 pixels in a box of 32
    heatmap[0, 1:4, 0] = 1
    heatmap[0, 5:8, 4:8] = 1  # 12 pixels in a box of 12
    assert boxes.largest_component_boxes(heatmap, np.array([0.5])).tolist() == [[[4, 5, 8, 8]]]


def test_a_map_without_a_pixel_at_the_threshold_has_an_empty_box() -> None:
    assert boxes.largest_component_boxes(np.zeros((2, 3, 3), np.float32), np.array([0.5])).tolist() == [[[0] * 4]] * 2


def enclosed_area(component: np.ndarray) -> float:
    """Within the polygon through the centres of a component's outer pixels: squares of four pixels count 1, three 1/2.

    Holes are filled by scipy, and nothing is followed around: an independent way to the same number.
    """
    filled = np.pad(ndimage.binary_fill_holes(component), 1)
    pixels = ndimage.convolve(filled.astype(int), np.ones((2, 2), int), mode="constant")
    return float((pixels == 4).sum() + 0.5 * (pixels == 3).sum())


def largest_contours_box(mask: np.ndarray) -> tuple[int, ...]:
    """The slow way, by scikit-image's labels; the first of those that enclose most."""
    regions = measure.regionprops(measure.label(mask, connectivity=2))
    if not regions:
        return (0, 0, 0, 0)
    areas = [enclosed_area(region.image) for region in regions]
    y_min, x_min, y_max, x_max = regions[int(np.argmax(areas))].bbox
    return (x_min, y_min, x_max, y_max)


@settings(max_examples=200, deadline=None)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=3, max_dims=3, max_side=9),
        elements=st.sampled_from([0.0, 0.2, 0.6, 0.8, 1.0]),
    )
)
def test_boxes_surround_the_contour_that_encloses_most(heatmaps: np.ndarray) -> None:
    thresholds = np.array([0.1, 0.4, 0.7, 1.0])
    found = boxes.largest_component_boxes(heatmaps, thresholds, "contours")
    for heatmap, row in zip(heatmaps, found, strict=True):
        for threshold, box in zip(thresholds.astype(np.float32), row, strict=True):
            assert tuple(box) == largest_contours_box(heatmap >= threshold)


@pytest.mark.parametrize("component", boxes.COMPONENTS)
def test_boxes_of_noise_equal_scikit_images(component: boxes.Component) -> None:
    # Smoothed noise has islands, holes and islands in holes; at 64 x 48 no two components tie by accident.
    noise = np.random.default_rng(7).random((10, 64, 48))
    heatmaps = np.stack([ndimage.gaussian_filter(one, 1.5) for one in noise]).astype(np.float32)
    thresholds = np.quantile(heatmaps, [0.05, 0.3, 0.45, 0.5, 0.55, 0.7, 0.95]).astype(np.float32)
    found = boxes.largest_component_boxes(heatmaps, thresholds, component)
    differ = 0
    for heatmap, row in zip(heatmaps, found, strict=True):
        for threshold, box in zip(thresholds, row, strict=True):
            regions = measure.regionprops(measure.label(heatmap >= threshold, connectivity=2))
            largest = max(regions, key=lambda region: region.area)
            by_pixels = (largest.bbox[1], largest.bbox[0], largest.bbox[3], largest.bbox[2])
            by_contour = largest_contours_box(heatmap >= threshold)
            differ += by_pixels != by_contour
            assert tuple(box) == (by_pixels if component == "pixels" else by_contour)
    assert differ > 0, "the two kinds agree everywhere: these maps do not tell them apart"


def test_a_ring_encloses_more_than_a_block_of_more_pixels() -> None:
    heatmap = np.zeros((1, 12, 24), np.float32)
    heatmap[0, 1:11, 1:11] = 1  # a ring of 36 pixels around 64 others, in which an island lies
    heatmap[0, 2:10, 2:10] = 0
    heatmap[0, 5:7, 5:7] = 1
    heatmap[0, 2:9, 14:20] = 1  # 42 pixels
    cut = np.array([0.5])
    assert boxes.largest_component_boxes(heatmap, cut, "pixels").tolist() == [[[14, 2, 20, 9]]]
    assert boxes.largest_component_boxes(heatmap, cut, "contours").tolist() == [[[1, 1, 11, 11]]]


def test_a_line_has_pixels_but_no_area() -> None:
    heatmap = np.zeros((1, 10, 20), np.float32)
    heatmap[0, 1, 1:19] = 1
    heatmap[0, 5:8, 5:8] = 1
    cut = np.array([0.5])
    assert boxes.largest_component_boxes(heatmap, cut, "pixels").tolist() == [[[1, 1, 19, 2]]]
    assert boxes.largest_component_boxes(heatmap, cut, "contours").tolist() == [[[5, 5, 8, 8]]]


@pytest.mark.parametrize("enlargement", ["bilinear", "bicubic"])
@pytest.mark.parametrize("component", boxes.COMPONENTS)
@pytest.mark.parametrize(("cells", "size"), [((7, 7), 224), ((8, 8), 64), ((4, 4), 30), ((5, 3), 5), ((2, 9), 6)])
def test_boxes_of_coarse_maps_are_those_of_the_enlarged_ones(
    cells: tuple[int, int], size: int, component: boxes.Component, enlargement: cam.Enlargement
) -> None:
    maps = torch.randn(6, *cells, generator=torch.Generator().manual_seed(3))
    thresholds = np.arange(1, 20) / 20
    heat = cam.heatmaps(maps, size, enlargement).numpy()
    found = boxes.cam_boxes(maps.numpy(), size, thresholds, component, enlargement)
    np.testing.assert_array_equal(found, boxes.largest_component_boxes(heat, thresholds, component))


def test_a_coarse_map_without_contrast_is_all_box_and_a_broken_one_none() -> None:
    maps = np.full((3, 4, 4), -2.5, np.float32)
    maps[1, 2, 2], maps[2, 0, 0] = np.nan, np.inf
    found = boxes.cam_boxes(maps, 32, np.array([0.05, 0.95]))
    assert found.tolist() == [[[0, 0, 32, 32]] * 2, [[0] * 4] * 2, [[0] * 4] * 2]
    assert boxes.largest_component_boxes(np.full((1, 3, 3), np.nan), np.array([0.5])).tolist() == [[[0] * 4]]


def test_a_broken_pixel_belongs_to_nothing_whatever_stands_before_it() -> None:
    heatmap = np.zeros((1, 4, 6), np.float32)
    heatmap[0, 1] = (0.9, 0.9, np.nan, 0.9, 0.9, 0.9)
    found = boxes.largest_component_boxes(heatmap, np.array([0.2, 0.8]))
    assert found.tolist() == [[[3, 1, 6, 2]] * 2]


def test_a_spiral_is_one_component_however_its_arms_meet() -> None:
    # The arms are separate runs for many rows and turn out to be one only at the end.
    side = 31
    spiral = np.zeros((side, side), np.float32)
    y, x, dy, dx = 1, 1, 0, 1
    spiral[y, x] = 1
    for length in [side - 3] * 3 + [value for value in range(side - 5, 1, -2) for _ in range(2)]:
        for _ in range(length):
            y, x = y + dy, x + dx
            spiral[y, x] = 1
        dy, dx = dx, -dy
    assert measure.label(spiral, connectivity=2).max() == 1
    for component in boxes.COMPONENTS:
        found = boxes.largest_component_boxes(spiral[None], np.array([0.5]), component)
        assert found.tolist() == [[[1, 1, side - 1, side - 1]]]


@pytest.mark.parametrize(
    ("thresholds", "component"), [([0.5, 0.4], "pixels"), (np.linspace(0, 1, 256), "pixels"), ([0.5], "blobs")]
)
def test_what_cannot_be_asked_is_refused(thresholds: list[float], component: str) -> None:
    for ask in (
        lambda: boxes.largest_component_boxes(np.ones((1, 2, 2)), np.array(thresholds), component),  # type: ignore[arg-type]
        lambda: boxes.cam_boxes(np.ones((1, 2, 2)), 4, np.array(thresholds), component),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"none below the one before it|there are pixels, contours"):
            ask()


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
