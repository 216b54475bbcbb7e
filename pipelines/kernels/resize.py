"""Antialiased bilinear resizing of interleaved 8-bit RGB: a triangle filter as wide as the reduction asks for.

The filter is that of Pillow and of torch's `interpolate(mode="bilinear", antialias=True)`: separable, centred on the
output pixel, cut off and renormalised at the edges. Rows are combined first, into one row of floats that stays in the
first-level cache, then the columns of that row, four lanes at a time. Every output pixel has the same number of taps,
some of weight 0: that costs less than a loop whose end the processor cannot predict.
"""

import math

import numpy as np
from numba import njit

from pipelines.kernels import OPTIONS
from pipelines.kernels.vectors import copy_bytes, weighted_pixels

_pixels_of_1, _pixels_of_2, _pixels_of_3, _pixels_of_4 = (weighted_pixels(taps) for taps in (1, 2, 3, 4))
_pixels_of_5, _pixels_of_6, _pixels_of_7, _pixels_of_8 = (weighted_pixels(taps) for taps in (5, 6, 7, 8))


@njit(**OPTIONS)
def count_taps(length: int, size: int) -> int:
    """Source pixels that one of `size` output pixels can depend on."""
    reduction = length / size
    return min(length, math.ceil(2.0 * reduction) + 1 if reduction > 1.0 else 2)


@njit(**OPTIONS)
def weigh(length: int, size: int, mirrored: bool) -> tuple[int, np.ndarray, np.ndarray]:
    """The filter along one axis.

    Args:
        length, size: source and output pixels.
        mirrored: output pixels run backwards.

    Returns:
        Source pixels that one output pixel depends on, taps; the first of them for each output pixel, (size,) int64;
        and the weights of the pixels from there on, (size * taps,) float32, which add up to 1.
    """
    taps = count_taps(length, size)
    firsts, weights = np.empty(size, np.int64), np.empty(size * taps, np.float32)
    scale = length / size
    reach = max(scale, 1.0)
    for index in range(size):
        centre = (index + 0.5) * scale
        first = min(max(0, int(centre - reach + 0.5)), length - taps)
        place = size - 1 - index if mirrored else index
        total = 0.0
        for tap in range(taps):
            weight = max(1.0 - abs(first + tap + 0.5 - centre) / reach, 0.0)
            weights[place * taps + tap] = weight
            total += weight
        firsts[place] = first
        for tap in range(taps):
            weights[place * taps + tap] /= total
    return taps, firsts, weights


@njit(**OPTIONS)
def resize(
    source: np.ndarray, height: int, width: int, stride: int, size: int, mirrored: bool, pixels: np.ndarray
) -> None:
    """Resize one image to a square, and mirror it left to right if so told.

    Args:
        source: (height * stride,) uint8 or longer; rows of interleaved RGB, `stride` bytes apart.
        height, width: of the source, pixels.
        size: side of the output, pixels.
        pixels: (size * size * 3 + 1,) uint8, filled; the last byte is room for a vector's end and means nothing.
    """
    scale(source, height, width, stride, 3, size, size, mirrored, pixels)


@njit(**OPTIONS)
def scale(
    source: np.ndarray,
    height: int,
    width: int,
    stride: int,
    channels: int,
    tall: int,
    wide: int,
    mirrored: bool,
    pixels: np.ndarray,
) -> None:
    """`resize` to any size, of pixels of three or four `channels`; a fourth one's output means nothing.

    Args:
        pixels: (tall * wide * channels,) uint8, filled; with three channels one longer, for a vector's end.
    """
    row_taps, row_firsts, row_weights = weigh(height, tall, False)
    column_taps, column_firsts, column_weights = weigh(width, wide, mirrored)
    column_firsts *= channels
    length = channels * width
    # Vectors reach one lane beyond the last pixel.
    row, other_row = np.zeros(length + 1, np.float32), np.zeros(length + 1, np.float32)
    line = np.empty(channels * wide + 1, np.uint8)
    # Two rows of output at a time; of an odd number the last one is made twice.
    for index in range(0, tall, 2):
        other = min(index + 1, tall - 1)
        start, other_start = row_firsts[index] * stride, row_firsts[other] * stride
        combine_rows(source, start, stride, length, row_weights, index * row_taps, row_taps, row)
        combine_rows(source, other_start, stride, length, row_weights, other * row_taps, row_taps, other_row)
        place = channels * wide * index
        combine_columns(
            row, other_row, channels, column_firsts, column_weights, column_taps, wide, pixels[place:], line
        )
        # Not written in place, for the end of the row above would be written over its beginning.
        copy_bytes(line, 0, pixels, channels * wide * other, channels * wide)


@njit(**OPTIONS)
def combine_rows(
    source: np.ndarray,
    start: int,
    stride: int,
    length: int,
    weights: np.ndarray,
    first: int,
    taps: int,
    row: np.ndarray,
) -> None:
    """Weighted sum of `taps` source rows of `length` values. Up to four at once: fewer passes over the sum."""
    tap = 0
    while tap < taps:
        together = min(4, taps - tap)
        place = first + tap
        one = source[start : start + length]
        by_one = weights[place]
        if together == 1:
            for index in range(length):
                row[index] = by_one * np.float32(one[index]) + (row[index] if tap else np.float32(0))
        elif together == 2:
            two, by_two = source[start + stride : start + stride + length], weights[place + 1]
            for index in range(length):
                total = by_one * np.float32(one[index]) + by_two * np.float32(two[index])
                row[index] = total + (row[index] if tap else np.float32(0))
        elif together == 3:
            two, by_two = source[start + stride : start + stride + length], weights[place + 1]
            three, by_three = source[start + 2 * stride : start + 2 * stride + length], weights[place + 2]
            for index in range(length):
                total = by_one * np.float32(one[index]) + by_two * np.float32(two[index])
                total += by_three * np.float32(three[index])
                row[index] = total + (row[index] if tap else np.float32(0))
        else:
            two, by_two = source[start + stride : start + stride + length], weights[place + 1]
            three, by_three = source[start + 2 * stride : start + 2 * stride + length], weights[place + 2]
            four, by_four = source[start + 3 * stride : start + 3 * stride + length], weights[place + 3]
            for index in range(length):
                total = by_one * np.float32(one[index]) + by_two * np.float32(two[index])
                total += by_three * np.float32(three[index]) + by_four * np.float32(four[index])
                row[index] = total + (row[index] if tap else np.float32(0))
        tap += together
        start += together * stride


@njit(**OPTIONS)
def combine_columns(
    row: np.ndarray,
    other_row: np.ndarray,
    channels: int,
    firsts: np.ndarray,
    weights: np.ndarray,
    taps: int,
    size: int,
    pixels: np.ndarray,
    line: np.ndarray,
) -> None:
    """Two rows of `size` output pixels, `pixels` and `line`, from two of floats; `firsts` count values, not pixels."""
    # One loop for each usual number of taps, which is then a constant in it.
    if taps == 1:
        for index in range(size):
            away = channels * index
            _pixels_of_1(row, other_row, firsts[index], channels, weights, index, pixels, away, line, away)
    elif taps == 2:
        for index in range(size):
            away = channels * index
            _pixels_of_2(row, other_row, firsts[index], channels, weights, 2 * index, pixels, away, line, away)
    elif taps == 3:
        for index in range(size):
            away = channels * index
            _pixels_of_3(row, other_row, firsts[index], channels, weights, 3 * index, pixels, away, line, away)
    elif taps == 4:
        for index in range(size):
            away = channels * index
            _pixels_of_4(row, other_row, firsts[index], channels, weights, 4 * index, pixels, away, line, away)
    elif taps == 5:
        for index in range(size):
            away = channels * index
            _pixels_of_5(row, other_row, firsts[index], channels, weights, 5 * index, pixels, away, line, away)
    elif taps == 6:
        for index in range(size):
            away = channels * index
            _pixels_of_6(row, other_row, firsts[index], channels, weights, 6 * index, pixels, away, line, away)
    elif taps == 7:
        for index in range(size):
            away = channels * index
            _pixels_of_7(row, other_row, firsts[index], channels, weights, 7 * index, pixels, away, line, away)
    elif taps == 8:
        for index in range(size):
            away = channels * index
            _pixels_of_8(row, other_row, firsts[index], channels, weights, 8 * index, pixels, away, line, away)
    else:
        for index in range(size):
            for channel in range(3):
                total = other_total = np.float32(0)
                for tap in range(taps):
                    weight, place = weights[taps * index + tap], firsts[index] + channels * tap + channel
                    total += weight * row[place]
                    other_total += weight * other_row[place]
                pixels[channels * index + channel] = np.uint8(np.rint(total))
                line[channels * index + channel] = np.uint8(np.rint(other_total))
