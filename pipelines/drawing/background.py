"""Textured backgrounds: stripes, tiles, blobs, dots and noise between two colours, with a gradient and grain on top."""

import numpy as np

KINDS = ("clouds", "stripes", "tiles", "blobs", "dots", "waves")
# Random numbers a background takes: its settings, then the values of its noise.
SETTINGS = 12
_COARSE = 6
_FINE = 24
NUMBERS = SETTINGS + _COARSE * _COARSE + _FINE * _FINE


def draw(size: int, colours: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A background.

    Args:
        size: side of the picture, pixels.
        colours: (2, 3) float64 RGB, 0 to 255; every pixel lies near the line between them.
        numbers: (NUMBERS,) float64 in [0, 1) that decide everything else.

    Returns:
        (3, size, size) int32, 0 to 255.
    """
    kind = KINDS[int(numbers[0] * len(KINDS))]
    coarse = numbers[SETTINGS : SETTINGS + _COARSE * _COARSE].reshape(_COARSE, _COARSE)
    fine = numbers[SETTINGS + _COARSE * _COARSE :].reshape(_FINE, _FINE)
    grid = (np.arange(size) + 0.5) / size
    x, y = grid[None, :], grid[:, None]
    # A direction without sines: its length only sets how wide the pattern is.
    across, down = 2 * numbers[1] - 1, 2 * numbers[2] - 1
    reach = abs(across) + abs(down) + 1e-3
    along = (x * across + y * down) / reach
    period = 0.08 + 0.22 * numbers[3]
    if kind == "stripes":
        share = _steep(_triangle((along + numbers[4]) / period), 3.0)
    elif kind == "waves":
        bent = along + 0.06 * _triangle((x * down - y * across) / reach / 0.3 + numbers[4])
        share = _triangle(bent / period)
    elif kind == "tiles":
        columns = np.floor(x / period + numbers[4])
        rows = np.floor(y / period + numbers[5])
        # A table of the fine noise gives each tile its own shade.
        share = fine[rows.astype(np.int64) % _FINE, columns.astype(np.int64) % _FINE]
    elif kind == "dots":
        u, v = x / period + numbers[4], y / period + numbers[5]
        u, v = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
        share = _ramp((0.1 - (u * u + v * v)) * 12 + 0.5)
    elif kind == "blobs":
        share = _ramp((enlarge(coarse, size) - 0.5) * 5 + 0.5)
    else:
        share = _ramp(0.65 * enlarge(coarse, size) + 0.35 * enlarge(fine[:12, :12], size))
    strength = 0.45 + 0.55 * numbers[6]
    tilt = (x - 0.5) * (2 * numbers[7] - 1) + (y - 0.5) * (2 * numbers[8] - 1)
    share = (share - 0.5) * strength + 0.5 + 0.4 * tilt
    grain = (enlarge(fine, size) - 0.5) * (6 + 18 * numbers[9])
    low, high = colours[:, :, None, None]
    plain = low + (high - low) * share + grain
    return np.floor(np.minimum(np.maximum(plain, 0.0), 255.0) + 0.5).astype(np.int32)


def enlarge(values: np.ndarray, size: int) -> np.ndarray:
    """(n, n) values at evenly spaced points, interpolated linearly to (size, size)."""
    cells = len(values) - 1
    at = (np.arange(size) + 0.5) / size * cells
    before = np.minimum(np.floor(at).astype(np.int64), cells - 1)
    share = at - before
    rows = values[before] + (values[before + 1] - values[before]) * share[:, None]
    return rows[:, before] + (rows[:, before + 1] - rows[:, before]) * share[None, :]


def _triangle(phase: np.ndarray) -> np.ndarray:
    """A wave of period 1 that rises from 0 to 1 and falls again."""
    return np.abs(2 * (phase - np.floor(phase)) - 1)


def _ramp(values: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(values, 0.0), 1.0)


def _steep(values: np.ndarray, factor: float) -> np.ndarray:
    return _ramp((values - 0.5) * factor + 0.5)
