"""Outlines in a unit frame: x to the right, y down, an object about within -1 to 1.

A contour is an (K, 2) float64 array of (x, y) corners that goes round its area in the positive sense; a hole goes round
the other way.
"""

import math
from itertools import pairwise

import numpy as np

Contour = np.ndarray
# Corners of the unit circle; 32 are round enough at any size a demo image has.
_STEPS = 32
_CIRCLE = np.array(
    [
        (round(math.cos(2 * math.pi * step / _STEPS), 6), round(math.sin(2 * math.pi * step / _STEPS), 6))
        for step in range(_STEPS + 1)
    ]
)


def polygon(*corners: tuple[float, float]) -> Contour:
    """The polygon with these corners, in either order."""
    double_area = 0.0
    for (x0, y0), (x1, y1) in pairwise((*corners, corners[0])):
        double_area += x0 * y1 - x1 * y0
    return np.array(corners if double_area > 0 else corners[::-1], np.float64)


def rectangle(left: float, top: float, right: float, bottom: float) -> Contour:
    """An upright rectangle."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(x: float, y: float, across: float, down: float) -> Contour:
    """An upright ellipse with the radii `across` and `down`."""
    return _CIRCLE[:-1] * (across, down) + (x, y)


def arc(x: float, y: float, across: float, down: float, start: int, stop: int) -> list[tuple[float, float]]:
    """Corners along an ellipse from 32nd `start` to 32nd `stop` of a turn; 0 points right, 8 down, 16 left, 24 up."""
    direction = 1 if stop >= start else -1
    points = (_CIRCLE[step % _STEPS] for step in range(start, stop + direction, direction))
    return [(x + across * float(point[0]), y + down * float(point[1])) for point in points]


def ring(x: float, y: float, across: float, down: float, width: float) -> list[Contour]:
    """An ellipse with a hole, `width` thick."""
    return [ellipse(x, y, across, down), ellipse(x, y, across - width, down - width)[::-1]]


def stroke(points: list[tuple[float, float]], width: float) -> list[Contour]:
    """A line through the points, `width` thick, with round ends and joints."""
    half = width / 2
    parts = [_CIRCLE[:-1:4] * half + point for point in points]
    for (x0, y0), (x1, y1) in pairwise(points):
        length = math.sqrt((x1 - x0) * (x1 - x0) + (y1 - y0) * (y1 - y0))
        across, down = half * (y1 - y0) / length, half * (x1 - x0) / length
        parts.append(
            polygon(
                (x0 - across, y0 + down), (x0 + across, y0 - down), (x1 + across, y1 - down), (x1 - across, y1 + down)
            )
        )
    return parts
