"""Quarter turns of a square block, in place."""

import numpy as np
from numba import njit

from pipelines.kernels import OPTIONS
from pipelines.kernels.vectors import copy_pixel


@njit(**OPTIONS)
def turn(pixels: np.ndarray, size: int, y: int, x: int, side: int, turns: int) -> None:
    """Turn the block of `side` pixels at (y, x) counter-clockwise by `turns` quarters.

    Args:
        pixels: (size * size * 3,) uint8 or longer, interleaved rows of a square image; changed in place.
    """
    turns %= 4
    if turns == 0 or side < 2:
        return
    # Blocks are copied and written back: gathering single pixels of the whole image by index is many times slower.
    length = 3 * side
    block = np.empty(side * length + 1, np.uint8)
    for row in range(side):
        start = ((y + row) * size + x) * 3
        source, target = pixels[start : start + length], block[row * length : row * length + length]
        for index in range(length):
            target[index] = source[index]
    last = side - 1
    for row in range(side):
        # Where in the block the first pixel of this row comes from, and how far it is to the next one.
        if turns == 1:
            place, step = 3 * (last - row), length
        elif turns == 2:
            place, step = (last - row) * length + 3 * last, -3
        else:
            place, step = last * length + 3 * row, -length
        start = ((y + row) * size + x) * 3
        # A pixel is copied as four bytes; the last of a row alone must not reach beyond the block.
        for _ in range(last):
            copy_pixel(block, place, pixels, start)
            start += 3
            place += step
        for channel in range(3):
            pixels[start + channel] = block[place + channel]
