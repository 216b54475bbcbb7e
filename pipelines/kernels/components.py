"""Boxes around the largest connected component of every super-level set of a map: all thresholds in one scan.

A pixel's level is the number of thresholds that it reaches. Where the level rises from one pixel to the next, runs of
all the thresholds between begin; where it falls they end. So a row is looked at once, and what is left to do is work on
runs, of which a smooth map has few. Components are 8-connected.

Two sizes of a component are known to the field, and they choose differently where one has holes or frays: its pixels,
and the area within its outer contour, a polygon through the centres of the pixels on its rim.
"""

import numpy as np
from numba import njit

from pipelines.kernels import OPTIONS

# A level has to fit into a byte, and the padding's level is 0.
MOST_THRESHOLDS = 255
# Comparisons with thresholds are to be the ones that are written, and the largest of a stretched map exactly 1.
_EXACT = {**OPTIONS, "fastmath": False}
_NOTHING, _UNREACHED = np.float32(-np.inf), np.float32(np.nan)
# Neighbours clockwise from the right, as rows grow downwards.
_DOWN = np.array([0, 1, 1, 1, 0, -1, -1, -1])
_RIGHT = np.array([1, 1, 0, -1, -1, -1, 0, 1])


@njit(**_EXACT)
def boxes_of_heat(heat: np.ndarray, thresholds: np.ndarray, enclosed: bool) -> np.ndarray:
    """Boxes of maps at full resolution.

    Args:
        heat: (N, H, W) float32. NaN reaches no threshold.
        thresholds: (T,) float32, not falling, at most MOST_THRESHOLDS.
        enclosed: the largest is the one with the largest area within its contour, not the one with the most pixels.

    Returns:
        (N, T, 4) int64 (x_min, y_min, x_max, y_max), half-open; 0, 0, 0, 0 where nothing reaches the threshold.
    """
    N, H, W = heat.shape
    boxes = np.zeros((N, len(thresholds), 4), np.int64)
    levels = np.zeros((H + 2, W + 2), np.uint8)
    steps = np.empty(H * (W + 1), np.int32)
    for n in range(N):
        _boxes(heat[n], thresholds, levels, steps, enclosed, boxes[n])
    return boxes


@njit(**_EXACT)
def boxes_of_maps(
    maps: np.ndarray,
    first: tuple[np.ndarray, np.ndarray],
    weights: tuple[np.ndarray, np.ndarray],
    thresholds: np.ndarray,
    enclosed: bool,
) -> np.ndarray:
    """Boxes of coarse maps, enlarged and stretched to 0 .. 1 one by one, so that no large map leaves the cache.

    Args:
        maps: (N, h, w) float32. One that is not finite reaches no threshold; one without contrast reaches all.
        first: for rows and for columns, the first cell that each pixel is made of: (H,) and (W,) int64.
        weights: of that cell and those behind it: (H, K) and (W, L) float32. Those that reach out of the map are 0.
        thresholds, enclosed: as in `boxes_of_heat`.

    Returns:
        (N, T, 4) int64, as `boxes_of_heat`.
    """
    N, h, w = maps.shape
    H, W = len(first[0]), len(first[1])
    boxes = np.zeros((N, len(thresholds), 4), np.int64)
    levels = np.zeros((H + 2, W + 2), np.uint8)
    steps = np.empty(H * (W + 1), np.int32)
    wide, large = np.empty((h, W), np.float32), np.empty((H, W), np.float32)
    for n in range(N):
        low, high = maps[n, 0, 0], maps[n, 0, 0]
        finite = True
        for y in range(h):
            for x in range(w):
                value = maps[n, y, x]
                finite &= np.isfinite(value)
                low, high = min(low, value), max(high, value)
        if not finite:
            continue
        if low == high:
            boxes[n, :, 2] = W
            boxes[n, :, 3] = H
            continue
        low, high = _enlarge(maps[n], first[0], first[1], weights[0], weights[1], wide, large)
        _stretch(large.reshape(-1), low, high - low)
        _boxes(large, thresholds, levels, steps, enclosed, boxes[n])
    return boxes


@njit(**OPTIONS)
def _enlarge(
    small: np.ndarray,
    first_row: np.ndarray,
    first_column: np.ndarray,
    row_weights: np.ndarray,
    column_weights: np.ndarray,
    wide: np.ndarray,
    large: np.ndarray,
) -> tuple[float, float]:
    """Fill `large`, by way of `wide`, whose rows are those of the small map; returns the smallest and largest value."""
    h, w = small.shape
    H, W = large.shape
    for y in range(h):
        for x in range(W):
            total = np.float32(0)
            for tap in range(min(column_weights.shape[1], w - first_column[x])):
                total += column_weights[x, tap] * small[y, first_column[x] + tap]
            wide[y, x] = total
    # By columns: as single numbers, extrema would not be taken on several lanes at once.
    lows, highs = np.full(W, np.inf, np.float32), np.full(W, -np.inf, np.float32)
    for y in range(H):
        row = large[y]
        row[:] = 0
        for tap in range(min(row_weights.shape[1], h - first_row[y])):
            weight, source = row_weights[y, tap], wide[first_row[y] + tap]
            for x in range(W):
                row[x] += weight * source[x]
        for x in range(W):
            lows[x] = row[x] if row[x] < lows[x] else lows[x]
            highs[x] = row[x] if row[x] > highs[x] else highs[x]
    return lows.min(), highs.max()


@njit(**_EXACT)
def _stretch(values: np.ndarray, low: float, spread: float) -> None:
    for index in range(len(values)):
        values[index] = (values[index] - low) / spread


@njit(**_EXACT)
def _boxes(
    heat: np.ndarray, thresholds: np.ndarray, levels: np.ndarray, steps: np.ndarray, enclosed: bool, boxes: np.ndarray
) -> None:
    """The boxes (T, 4) of one map (H, W). `levels` has a frame of zeros around the map's pixels, which are set here."""
    (H, W), T = heat.shape, len(thresholds)
    if T == 0:
        return
    flat = levels.reshape(-1)
    # Where the level changes within a row, and how many runs begin at each level, as differences along the levels.
    count, begun = 0, np.zeros(T + 2, np.int64)
    for y in range(H):
        level, place = 0, (y + 1) * (W + 2)
        # What the pixels of the level have, kept at hand: a pixel is compared with two numbers, and seldom with more.
        least, limit = _NOTHING, thresholds[0]
        for x in range(W):
            value = heat[y, x]
            place += 1
            if not value >= least or value >= limit:
                before = level
                while level < T and value >= thresholds[level]:
                    level += 1
                # NaN goes down to 0.
                while level > 0 and not value >= thresholds[level - 1]:
                    level -= 1
                least = thresholds[level - 1] if level > 0 else _NOTHING
                limit = thresholds[level] if level < T else _UNREACHED
                if level != before:
                    steps[count] = place
                    count += 1
                    if level > before:
                        begun[before + 1] += 1
                        begun[level + 1] -= 1
            flat[place] = level
        if level > 0:
            steps[count] = place + 1
            count += 1
    # Runs of level k are numbers start[k] to start[k + 1] - 1; level 0 is everything and has none.
    start = np.zeros(T + 2, np.int64)
    runs = 0
    for level in range(1, T + 1):
        runs += begun[level]
        start[level + 1] = start[level] + runs
    begins, ends = np.empty(start[T + 1], np.int32), np.empty(start[T + 1], np.int32)
    following = start.copy()
    for index in range(count):
        place = steps[index]
        old, new = flat[place - 1], flat[place]
        for level in range(old + 1, new + 1):
            begins[following[level]] = place
        for level in range(new + 1, old + 1):
            ends[following[level]] = place
            following[level] += 1
    root = np.empty(start[T + 1], np.int32)
    sizes = np.empty((start[T + 1], 4), np.int32)
    for level in range(1, T + 1):
        a, b = start[level], start[level + 1]
        if a == b:
            # Nothing reaches what lies above either.
            break
        _join(begins[a:b], ends[a:b], W + 2, root[a:b])
        best = _largest(begins[a:b], ends[a:b], root[a:b], sizes[a:b], flat, W + 2, level, enclosed)
        # Without the frame.
        boxes[level - 1, 0] = sizes[a + best, 1] - 1
        boxes[level - 1, 1] = begins[a + best] // (W + 2) - 1
        boxes[level - 1, 2] = sizes[a + best, 2] - 1
        boxes[level - 1, 3] = sizes[a + best, 3]


@njit(**OPTIONS)
def _find(root: np.ndarray, run: int) -> int:
    while root[run] != run:
        root[run] = root[root[run]]
        run = root[run]
    return run


@njit(**OPTIONS)
def _join(begins: np.ndarray, ends: np.ndarray, stride: int, root: np.ndarray) -> None:
    """Runs in raster order: `root` becomes the first run of the component that each belongs to.

    Places are flat indices of a framed image with `stride` pixels a row; the frame keeps runs of different rows apart.
    """
    above = 0
    for run in range(len(begins)):
        root[run] = run
        # A run a row higher touches if it begins at or before this one's end and ends at or behind its begin.
        low, high = begins[run] - stride, ends[run] - stride
        while ends[above] < low:
            above += 1
        other = above
        while other < run and begins[other] <= high:
            mine, its = _find(root, run), _find(root, other)
            root[max(mine, its)] = min(mine, its)
            other += 1
    for run in range(len(begins)):
        # What a run points to comes before it, and points to its first already.
        root[run] = root[root[run]]


@njit(**OPTIONS)
def _largest(
    begins: np.ndarray,
    ends: np.ndarray,
    root: np.ndarray,
    sizes: np.ndarray,
    flat: np.ndarray,
    stride: int,
    level: int,
    enclosed: bool,
) -> int:
    """The first run of the largest component; of several, of the one that is met first, row by row.

    `sizes` of the first run of each component becomes its pixels, and x_min, x_max and y_max with the frame.
    """
    row, below = 0, stride
    for run in range(len(begins)):
        # Counted on, because a division takes longer than all the rest.
        while begins[run] >= below:
            row += 1
            below += stride
        x_min, x_max = begins[run] - below + stride, ends[run] - below + stride
        first = root[run]
        if first == run:
            sizes[run, 0], sizes[run, 1], sizes[run, 2], sizes[run, 3] = x_max - x_min, x_min, x_max, row
        else:
            sizes[first, 0] += x_max - x_min
            if x_min < sizes[first, 1]:
                sizes[first, 1] = x_min
            if x_max > sizes[first, 2]:
                sizes[first, 2] = x_max
            sizes[first, 3] = row
    best = 0
    for run in range(len(begins)):
        if root[run] == run and sizes[run, 0] > sizes[best, 0]:
            best = run
    if enclosed:
        # The one with the most pixels first: few others can then enclose more, and need not be walked around.
        most = _area(flat, stride, begins[best], level)
        winner = best
        for run in range(len(begins)):
            if root[run] != run or run == best:
                continue
            limit = (sizes[run, 2] - sizes[run, 1] - 1) * (sizes[run, 3] - begins[run] // stride)
            if 2 * limit < most:
                continue
            area = _area(flat, stride, begins[run], level)
            if area > most or (area == most and run < winner):
                most, winner = area, run
        best = winner
    return best


@njit(**OPTIONS)
def _area(flat: np.ndarray, stride: int, start: int, level: int) -> int:
    """Twice the area within the outer contour of the component whose first pixel, in raster order, lies at `start`.

    The contour is followed as by Suzuki and Abe ("Topological structural analysis of digitized binary images by border
    following", 1985), and its area is the shoelace formula's.
    """
    direction = 4
    for _ in range(8):
        if flat[start + _DOWN[direction] * stride + _RIGHT[direction]] >= level:
            break
        direction = (direction + 1) % 8
    else:
        return 0
    second = start + _DOWN[direction] * stride + _RIGHT[direction]
    place, y, x, twice = start, 0, 0, 0
    while True:
        direction = (direction + 7) % 8
        while flat[place + _DOWN[direction] * stride + _RIGHT[direction]] < level:
            direction = (direction + 7) % 8
        down, right = _DOWN[direction], _RIGHT[direction]
        twice += x * down - y * right
        following = place + down * stride + right
        if following == start and place == second:
            return abs(twice)
        place, y, x = following, y + down, x + right
        direction = (direction + 4) % 8
