"""From contours to antialiased coverage, in integers, and paint by coverage."""

import math

import numpy as np

# Rows and columns of one pixel that are told apart; their product, the coverage of a full pixel, is FULL.
_ROWS = 4
_COLUMN_BITS = 6
_COLUMNS = 1 << _COLUMN_BITS
FULL = _ROWS * _COLUMNS


class Patch:
    """Coverage of a part of the picture: `amount` (h, w) int32 in 0..FULL, its top left corner at (y, x)."""

    __slots__ = ("amount", "x", "y")

    def __init__(self, y: int, x: int, amount: np.ndarray) -> None:
        self.y, self.x, self.amount = y, x, amount

    def of(self, picture: np.ndarray) -> np.ndarray:
        """The view of the picture (..., H, W) that lies under the patch."""
        height, width = self.amount.shape
        return picture[..., self.y : self.y + height, self.x : self.x + width]


def cover(contours: list[np.ndarray], height: int, width: int) -> Patch:
    """How much of each pixel the contours enclose, clipped to a picture of this size.

    Where contours overlap a full pixel stays full; the parts of a pixel that they cover each are added.

    Each row of pixels is cut by four lines; where an edge crosses a line, coverage begins or ends, to 1/64 pixel. The
    crossings are summed from left to right (as font rasterisers do).
    """
    starts = np.concatenate(contours)
    counts = np.array([len(contour) for contour in contours])
    stops = np.cumsum(counts)
    following = np.arange(1, len(starts) + 1)
    following[stops - 1] = stops - counts
    (left, top), (right, bottom) = starts.min(axis=0).tolist(), starts.max(axis=0).tolist()
    left, right = max(math.floor(left), 0), min(math.ceil(right), width)
    top, bottom = max(math.floor(top), 0), min(math.ceil(bottom), height)
    if left >= right or top >= bottom:
        return Patch(0, 0, np.zeros((0, 0), np.int32))
    rows, columns = bottom - top, right - left

    x0, y0 = starts[:, 0].copy(), starts[:, 1].copy()
    rise = y0[following] - y0
    slope = (x0[following] - x0) / np.where(rise == 0, 1.0, rise)
    # Line k lies at height (k + 1/2) / _ROWS; an edge crosses those from the first below one end to that of the other.
    first = np.ceil(y0 * _ROWS - 0.5).astype(np.int64) - top * _ROWS
    first = np.minimum(np.maximum(first, 0), rows * _ROWS)
    beyond = first[following]
    crossed = np.abs(beyond - first)
    edge = np.repeat(np.arange(len(starts)), crossed)
    line = np.arange(len(edge)) + (np.minimum(first, beyond) - (np.cumsum(crossed) - crossed))[edge]
    crossings = x0[edge] + ((line + (top * _ROWS + 0.5)) / _ROWS - y0[edge]) * slope[edge]
    places = np.floor(crossings * _COLUMNS + 0.5).astype(np.int64) - left * _COLUMNS
    places = np.minimum(np.maximum(places, 0), columns * _COLUMNS)
    sign = np.where(rise > 0, -1, 1)[edge]
    inside = places & (_COLUMNS - 1)
    cell = (line // _ROWS) * (columns + 2) + (places >> _COLUMN_BITS)
    # Sums of small integers are exact in floating point, in any order.
    changes = np.bincount(
        np.concatenate([cell, cell + 1]),
        np.concatenate([sign * (_COLUMNS - inside), sign * inside]),
        rows * (columns + 2),
    )
    amount = np.cumsum(changes.astype(np.int32).reshape(rows, columns + 2), axis=1, dtype=np.int32)[:, :columns]
    return Patch(top, left, np.minimum(np.abs(amount), FULL))


def widen(patch: Patch, radius: int, height: int, width: int) -> Patch:
    """The patch grown by `radius` pixels on all sides, within a picture of this size."""
    top, left = min(radius, patch.y), min(radius, patch.x)
    rows, columns = patch.amount.shape
    bottom = min(radius, height - patch.y - rows)
    right = min(radius, width - patch.x - columns)
    amount = np.zeros((top + rows + bottom, left + columns + right), np.int32)
    amount[top : top + rows, left : left + columns] = patch.amount
    for _ in range(radius):
        grown = amount.copy()
        np.maximum(grown[1:], amount[:-1], out=grown[1:])
        np.maximum(grown[:-1], amount[1:], out=grown[:-1])
        amount = grown.copy()
        np.maximum(amount[:, 1:], grown[:, :-1], out=amount[:, 1:])
        np.maximum(amount[:, :-1], grown[:, 1:], out=amount[:, :-1])
    return Patch(patch.y - top, patch.x - left, amount)


def paint(picture: np.ndarray, patch: Patch, colour: np.ndarray) -> None:
    """Lay a colour, (3, 1, 1) or one per pixel of the patch (3, h, w), over a (3, H, W) int32 picture, in place."""
    under = patch.of(picture)
    under += ((colour - under) * patch.amount + FULL // 2) >> 8
