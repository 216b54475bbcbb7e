"""One picture resized to any height and width by the filter of `resize`, for what is prepared ahead of training."""

import numpy as np
from numba import njit

from pipelines.kernels import OPTIONS
from pipelines.kernels.resize import combine_columns, combine_rows, weigh


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image of another size: antialiased, rounded, aligned by the centres of its pixels.

    Args:
        pixels: (H, W, 3) or (H, W, 4) uint8; a fourth channel means nothing.

    Returns:
        (height, width, 4) uint8; the fourth channel means nothing. Pillow takes such pixels without a copy.
    """
    source = np.ascontiguousarray(pixels)
    result = np.empty(height * width * 4, np.uint8)
    _resize(source.reshape(-1), *source.shape, height, width, result)
    return result.reshape(height, width, 4)


@njit(**OPTIONS)
def _resize(
    source: np.ndarray, height: int, width: int, channels: int, tall: int, wide: int, pixels: np.ndarray
) -> None:
    row_taps, row_firsts, row_weights = weigh(height, tall, False)
    column_taps, column_firsts, column_weights = weigh(width, wide, False)
    column_firsts *= 3
    length = channels * width
    # Vectors reach one lane beyond the last pixel.
    row, dense, packed = (
        np.zeros(length, np.float32),
        np.zeros(3 * width + 1, np.float32),
        np.zeros(3 * wide + 1, np.uint8),
    )
    for index in range(tall):
        start = row_firsts[index] * length
        combine_rows(source, start, length, length, row_weights, index * row_taps, row_taps, row)
        if channels == 4:
            # In the first-level cache; to leave the fourth channel out of the source first costs more.
            for pixel in range(width):
                dense[3 * pixel] = row[4 * pixel]
                dense[3 * pixel + 1] = row[4 * pixel + 1]
                dense[3 * pixel + 2] = row[4 * pixel + 2]
        else:
            dense[:length] = row[:length]
        combine_columns(dense, column_firsts, column_weights, column_taps, wide, packed, 0)
        place = 4 * wide * index
        for pixel in range(wide):
            pixels[place + 4 * pixel] = packed[3 * pixel]
            pixels[place + 4 * pixel + 1] = packed[3 * pixel + 1]
            pixels[place + 4 * pixel + 2] = packed[3 * pixel + 2]
            pixels[place + 4 * pixel + 3] = 255
