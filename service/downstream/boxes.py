"""From heat maps to boxes: the largest connected component of every super-level set, and what a box is worth.

A box is (x_min, y_min, x_max, y_max) in half-open pixel coordinates: pixel (y, x) alone is (x, y, x + 1, y + 1).

Which component is the largest is decided by one of two sizes, and the field uses both. "pixels": the one with the most
pixels, as Zhou et al. (CVPR 2016, 3.2) say it. "contours": the one whose outer contour encloses the largest area, as
published evaluations do it by OpenCV's findContours and contourArea (Choe et al., CVPR 2020; Co-mixup). The second
counts what lies in holes, and takes half a pixel off every side: a long thin component has pixels, but no area.
"""

from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch

from pipelines.kernels import components
from service.downstream import cam

Component = Literal["pixels", "contours"]
COMPONENTS: tuple[Component, ...] = get_args(Component)


def largest_component_boxes(
    heatmaps: np.ndarray, thresholds: np.ndarray, component: Component = "pixels"
) -> np.ndarray:
    """Tight boxes around the largest 8-connected component of `heatmap >= threshold`, compared in float32.

    Of components of equal size the one that is met first, row by row, is taken.

    Args:
        heatmaps: (N, H, W) floating. NaN reaches no threshold.
        thresholds: (T,) not falling, at most 255 of them.
        component: what the largest has most of; see the module.

    Returns:
        (N, T, 4) int64 boxes in pixels of the map; a threshold that nothing reaches gives (0, 0, 0, 0).

    Raises:
        ValueError: too many thresholds, thresholds that fall, or an unknown `component`.
    """
    cuts = _checked(thresholds, component)
    return components.boxes_of_heat(np.ascontiguousarray(heatmaps, np.float32), cuts, component == "contours")


def cam_boxes(
    maps: np.ndarray,
    size: int,
    thresholds: np.ndarray,
    component: Component = "pixels",
    enlargement: cam.Enlargement = "bilinear",
) -> np.ndarray:
    """What `largest_component_boxes` gives for `cam.heatmaps(maps, size)`, without making those: several times as fast.

    Differs from it by rounding only: by pixels that lie within 1e-6 of a threshold.

    Args:
        maps: (N, h, w) floating. A map that is not finite has no box; one without contrast, a box of everything.
        size: side of the network's input, pixels.
        thresholds: (T,) not falling, at most 1, shares of the map's range.

    Returns:
        (N, T, 4) int64 boxes in pixels of the input.

    Raises:
        ValueError: as `largest_component_boxes`.
    """
    cuts = _checked(thresholds, component)
    coarse = np.ascontiguousarray(maps, np.float32)
    taps = [_taps(size, cells, enlargement) for cells in coarse.shape[1:]]
    first, weights = (tuple(parts) for parts in zip(*taps, strict=True))
    return components.boxes_of_maps(coarse, first, weights, cuts, component == "contours")


def _checked(thresholds: np.ndarray, component: str) -> np.ndarray:
    cuts = np.ascontiguousarray(thresholds, np.float32)
    if component not in COMPONENTS:
        raise ValueError(f"component {component!r} does not exist; there are {', '.join(COMPONENTS)}")
    if cuts.ndim != 1 or len(cuts) > components.MOST_THRESHOLDS or (np.diff(cuts) < 0).any():
        most = components.MOST_THRESHOLDS
        raise ValueError(f"thresholds of shape {cuts.shape}: needs at most {most}, none below the one before it")
    return cuts


@lru_cache(maxsize=32)
def _taps(size: int, cells: int, enlargement: cam.Enlargement) -> tuple[np.ndarray, np.ndarray]:
    """Of which cells each of `size` pixels is made: the first one (size,) int64, and weights (size, K) float32."""
    matrix = cam.interpolation(size, cells, torch.device("cpu"), enlargement).numpy()
    taken = matrix != 0
    first = taken.argmax(axis=1)
    span = int((cells - taken[:, ::-1].argmax(axis=1) - first).max())
    padded = np.pad(matrix, ((0, 0), (0, span)))
    return first, np.ascontiguousarray(padded[np.arange(size)[:, None], first[:, None] + np.arange(span)], np.float32)


def best_iou(boxes: np.ndarray, truths: list[np.ndarray]) -> np.ndarray:
    """Each box's intersection over union with the true box of its image that it fits best.

    Disjoint boxes have 0, and so has everything in an image without true boxes.

    Args:
        boxes: (N, K, 4), K boxes an image.
        truths: N arrays (M_n, 4).

    Returns:
        (N, K) float64 in 0 .. 1.
    """
    most = max((len(truth) for truth in truths), default=0)
    if most == 0:
        return np.zeros(boxes.shape[:2])
    true = np.zeros((len(truths), 1, most, 4))
    for row, truth in zip(true, truths, strict=True):
        row[0, : len(truth)] = truth
    box = boxes[:, :, None].astype(np.float64)
    overlap = np.minimum(box[..., 2:], true[..., 2:]) - np.maximum(box[..., :2], true[..., :2])
    # Each side on its own: two negative sides would multiply to a positive area.
    sides = np.maximum(overlap, 0)
    intersection = sides[..., 0] * sides[..., 1]
    union = _area(box) + _area(true) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0).max(axis=2)


def centre_boxes(heights: np.ndarray, widths: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Boxes in the middle of images that know nothing of their content: `shares` (K,) of both sides.

    Returns:
        (N, K, 4) float64, for images of `heights` (N,) and `widths` (N,).
    """
    sides = np.stack([widths, heights], axis=1)[:, None].astype(np.float64)
    low = sides * (1 - shares[None, :, None]) / 2
    return np.concatenate([low, sides - low], axis=2)


def to_source(boxes: np.ndarray, windows: np.ndarray, size: int) -> np.ndarray:
    """Boxes in pixels of the network's input (N, K, 4), a square of `size`, as boxes in pixels of the source image.

    Exact: the input shows the window (y, x, height, width) of `windows` (N, 4) edge to edge. float64.
    """
    scale, offset = _affine(windows)
    return boxes * (scale / size) + offset


def to_view(boxes: np.ndarray, windows: np.ndarray, size: int) -> np.ndarray:
    """The inverse of `to_source`; what lies outside the window gets coordinates below 0 or above `size`."""
    scale, offset = _affine(windows)
    return (boxes - offset) / (scale / size)


def _affine(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, x, height, width = np.asarray(windows, np.float64).T[:, :, None]
    return np.stack([width, height, width, height], axis=-1), np.stack([x, y, x, y], axis=-1)


def _area(boxes: np.ndarray) -> np.ndarray:
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    area: np.ndarray = sides[..., 0] * sides[..., 1]
    return area
