"""The 8-bit operations of `augment.operations`, as torchvision's functional transforms do them on uint8 tensors.

Exactly: the arithmetic is theirs, in float32, operation by operation, with a product and a sum rounded once where torch
does so. Where an operation maps each value to another, it is done by a table of the 256 of them.
"""

import math

import numpy as np
from numba import njit

from pipelines.augment.operations import Operation
from pipelines.kernels import OPTIONS
from pipelines.kernels.arithmetic import fused

# Nothing may be reordered, or rounding is not torch's.
_OPTIONS = {**OPTIONS, "fastmath": False}

_SHEAR_X, _SHEAR_Y = int(Operation.SHEAR_X), int(Operation.SHEAR_Y)
_TRANSLATE_X, _TRANSLATE_Y = int(Operation.TRANSLATE_X), int(Operation.TRANSLATE_Y)
_ROTATE = int(Operation.ROTATE)
_BRIGHTNESS, _CONTRAST = int(Operation.BRIGHTNESS), int(Operation.CONTRAST)
_SATURATION, _SHARPNESS = int(Operation.SATURATION), int(Operation.SHARPNESS)
_POSTERIZE, _SOLARIZE, _INVERT = int(Operation.POSTERIZE), int(Operation.SOLARIZE), int(Operation.INVERT)
_AUTO_CONTRAST, _EQUALIZE = int(Operation.AUTO_CONTRAST), int(Operation.EQUALIZE)
_HUE, _LIGHTING = int(Operation.HUE), int(Operation.LIGHTING)

# Of ITU-R 601, rounded as torchvision has them.
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
_ZERO, _HALF, _ONE, _TOP = np.float32(0.0), np.float32(0.5), np.float32(1.0), np.float32(255.0)
_PER_VALUE, _THIRTEENTH = np.float32(1.0 / 255.0), np.float32(1.0 / 13.0)
_SIXTH, _SIX, _TWO, _FOUR = np.float32(1.0 / 6.0), np.float32(6.0), np.float32(2.0), np.float32(4.0)
# What torchvision multiplies numbers up to 1 by, to cut them to 0..255.
_TO_BYTE = np.float32(255.0 + 1.0 - 1e-3)


@njit(**_OPTIONS)
def apply(pixels: np.ndarray, code: int, amounts: np.ndarray, scratch: np.ndarray) -> None:
    """Do one operation in place; NOTHING, ERASE and unknown codes leave the pixels as they are.

    Args:
        pixels: (S, S, 3) uint8, C-contiguous.
        code: of `augment.operations.Operation`.
        amounts: (4,) float32.
        scratch: (S, S, 3) uint8, C-contiguous, overwritten.
    """
    size, target, source = pixels.shape[0], pixels.reshape(-1), scratch.reshape(-1)
    amount = amounts[0]
    if code <= _ROTATE or code == _SHARPNESS:
        for place in range(len(target)):
            source[place] = target[place]
    # One call of each: what is called twice is compiled twice.
    if code in (_TRANSLATE_X, _TRANSLATE_Y):
        down, right = (int(amount), 0) if code == _TRANSLATE_Y else (0, int(amount))
        _translate(target, size, down, right, source)
    elif _SHEAR_X <= code <= _ROTATE:
        xx, xy, yx, yy, fixed = 1.0, 0.0, 0.0, 1.0, -0.5 * size
        if code == _ROTATE:
            turn = math.radians(-amount % 360.0)
            xx, xy, yx, yy, fixed = math.cos(turn), math.sin(turn), -math.sin(turn), math.cos(turn), 0.0
        else:
            # By way of degrees, as in torchvision: a last bit decides where two pixels are equally near.
            tangent = math.tan(math.radians(math.degrees(math.atan(np.float64(amount)))))
            xy, yx = (tangent, 0.0) if code == _SHEAR_X else (0.0, tangent)
        _warp(target, size, xx, xy, yx, yy, fixed, source)
    elif code == _SHARPNESS:
        _sharpen(target, 3 * size, amount, source)
    elif code == _SATURATION:
        _saturate(target, amount)
    elif code == _HUE:
        _turn_hue(target, amount)
    elif _BRIGHTNESS <= code <= _LIGHTING:
        table = np.empty(768, np.uint8)
        if code == _EQUALIZE:
            _tabulate_equalized(target, table)
        elif code == _AUTO_CONTRAST:
            _tabulate_stretched(target, table)
        else:
            _tabulate(code, amounts, _mean_grey(target) if code == _CONTRAST else _ZERO, table)
        for place in range(0, len(target), 3):
            target[place] = table[target[place]]
            target[place + 1] = table[256 + int(target[place + 1])]
            target[place + 2] = table[512 + int(target[place + 2])]


@njit(**_OPTIONS)
def _byte(value: float) -> np.uint8:
    """A number, held within 0 and 255 and cut to a whole one."""
    return np.uint8(np.int32(min(max(np.float32(value), _ZERO), _TOP)))


@njit(**_OPTIONS)
def _tabulate(code: int, amounts: np.ndarray, mean: float, table: np.ndarray) -> None:
    """Fill (768,) with what each value of R, G and B becomes, where that depends on no more than a mean."""
    amount, rest, mask = amounts[0], _ONE - amounts[0], 0xFF00 >> int(min(max(amounts[0], _ZERO), np.float32(8.0)))
    for place in range(768):
        number = place & 255
        value = np.float32(number)
        if code == _BRIGHTNESS:
            value = value * amount
        elif code == _CONTRAST:
            value = fused(mean, rest, value * amount)
        elif code == _SOLARIZE:
            value = _TOP - value if value >= amount else value
        elif code == _INVERT:
            value = _TOP - value
        elif code == _POSTERIZE:
            value = np.float32(number & mask)
        else:
            value = np.rint(value + amounts[place >> 8])
        table[place] = _byte(value)


@njit(**_OPTIONS)
def _tabulate_stretched(target: np.ndarray, table: np.ndarray) -> None:
    """Fill (768,) so that the darkest value of each channel becomes 0 and the brightest 255."""
    for channel in range(3):
        lowest, highest = 255, 0
        for place in range(channel, len(target), 3):
            lowest, highest = min(lowest, int(target[place])), max(highest, int(target[place]))
        start, scale = np.float32(lowest), np.float32(highest - lowest) * _PER_VALUE
        if highest == lowest:
            start, scale = _ZERO, _ONE
        for number in range(256):
            table[256 * channel + number] = _byte((np.float32(number) - start) / scale)


@njit(**_OPTIONS)
def _tabulate_equalized(target: np.ndarray, table: np.ndarray) -> None:
    """Fill (768,) so that all values of a channel become equally frequent, by Pillow's rule."""
    counts = np.zeros(768, np.int32)
    for place in range(0, len(target), 3):
        counts[target[place]] += 1
        counts[256 + int(target[place + 1])] += 1
        counts[512 + int(target[place + 2])] += 1
    for channel in range(3):
        last = 256 * channel + 255
        while counts[last] == 0:
            last -= 1
        step = (len(target) // 3 - int(counts[last])) // 255
        total = step // 2
        for number in range(256):
            place = 256 * channel + number
            table[place] = np.uint8(number if step == 0 else min(total // step, 255))
            total += int(counts[place])


@njit(**_OPTIONS)
def _grey(target: np.ndarray, place: int) -> float:
    red, green, blue = np.float32(target[place]), np.float32(target[place + 1]), np.float32(target[place + 2])
    return np.floor(fused(blue, _BLUE, fused(green, _GREEN, red * _RED)))


@njit(**_OPTIONS)
def _mean_grey(target: np.ndarray) -> np.float32:
    total = 0
    for place in range(0, len(target), 3):
        total += int(_grey(target, place))
    return np.float32(total) / np.float32(len(target) // 3)


@njit(**_OPTIONS)
def _saturate(target: np.ndarray, factor: float) -> None:
    rest = _ONE - factor
    for place in range(0, len(target), 3):
        grey = _grey(target, place)
        target[place] = _byte(fused(grey, rest, np.float32(target[place]) * factor))
        target[place + 1] = _byte(fused(grey, rest, np.float32(target[place + 1]) * factor))
        target[place + 2] = _byte(fused(grey, rest, np.float32(target[place + 2]) * factor))


@njit(**_OPTIONS)
def _sharpen(target: np.ndarray, row: int, factor: float, source: np.ndarray) -> None:
    """Move away from (or towards) a 3 x 3 blur with 5 in the middle; the border stays. A row has `row` bytes."""
    rest = _ONE - factor
    sums = np.empty(row, np.float32)
    for start in range(row, len(target) - row, row):
        above, here, below = source[start - row : start], source[start : start + row], source[start + row :]
        for place in range(row):
            sums[place] = np.float32(above[place]) + np.float32(here[place]) + np.float32(below[place])
        written = target[start + 3 : start + row - 3]
        for place in range(row - 6):
            value = np.float32(here[place + 3])
            total = sums[place] + sums[place + 3] + sums[place + 6] + _FOUR * value
            # Thirteenths are never halfway between two numbers: however they are computed, they are rounded alike.
            written[place] = _byte(fused(np.rint(total * _THIRTEENTH) - value, rest, value))


@njit(**_OPTIONS)
def _translate(target: np.ndarray, size: int, down: int, right: int, source: np.ndarray) -> None:
    """Move the image and leave black behind."""
    row, shift = 3 * size, 3 * (down * size + right)
    for y in range(size):
        start, seen = y * row, 0 <= y - down < size and abs(right) < size
        first, last = (3 * max(right, 0), row + 3 * min(right, 0)) if seen else (row, row)
        for place in range(start, start + first):
            target[place] = 0
        for place in range(start + first, start + last):
            target[place] = source[place - shift]
        for place in range(start + last, start + row):
            target[place] = 0


@njit(**_OPTIONS)
def _warp(
    target: np.ndarray, size: int, xx: float, xy: float, yx: float, yy: float, fixed: float, source: np.ndarray
) -> None:
    """Each pixel becomes the one nearest to its place times (xx, xy; yx, yy), about the point (`fixed`, `fixed`).

    Places are computed as torch does it: in pixels from the centre, then in halves of the image, then as indices.
    """
    half, end = np.float32(0.5 * size), np.float32(size)
    shift_x = np.float32(fixed - xx * fixed - xy * fixed) / half
    shift_y = np.float32(fixed - yx * fixed - yy * fixed) / half
    x_by_x, x_by_y = np.float32(xx) / half, np.float32(xy) / half
    y_by_x, y_by_y = np.float32(yx) / half, np.float32(yy) / half
    first = np.float32((1.0 - size) * 0.5)
    places = np.empty(size, np.int32)
    for y in range(size):
        down = first + np.float32(y)
        for x in range(size):
            right = first + np.float32(x)
            column = np.rint((fused(down, x_by_y, right * x_by_x) + shift_x + _ONE) * half - _HALF)
            line = np.rint((fused(down, y_by_y, right * y_by_x) + shift_y + _ONE) * half - _HALF)
            inside = (column > -_ONE) & (column < end) & (line > -_ONE) & (line < end)
            places[x] = np.int32(line * end + column) * 3 if inside else np.int32(-1)
        start = 3 * y * size
        for x in range(size):
            place = places[x]
            for channel in range(3):
                target[start + 3 * x + channel] = source[place + channel] if place >= 0 else np.uint8(0)


@njit(**_OPTIONS)
def _turn_hue(target: np.ndarray, shift: float) -> None:
    """Turn the hue by a share of the circle, through hue, saturation and value."""
    for place in range(0, len(target), 3):
        red = np.float32(target[place]) * _PER_VALUE
        green = np.float32(target[place + 1]) * _PER_VALUE
        blue = np.float32(target[place + 2]) * _PER_VALUE
        value, lowest = max(red, green, blue), min(red, green, blue)
        reach = value - lowest
        # A grey has no hue and no saturation.
        saturation, divisor = (reach / value, reach) if reach > _ZERO else (_ZERO, _ONE)
        r, g, b = (value - red) / divisor, (value - green) / divisor, (value - blue) / divisor
        if value == red:
            hue = b - g
        elif value == green:
            hue = r + _TWO - b
        else:
            hue = g + _FOUR - r
        hue = hue * _SIXTH + _ONE
        hue = hue - np.floor(hue) + shift
        hue = (hue - np.floor(hue)) * _SIX
        sector = np.floor(hue)
        part, without = (hue - sector) * saturation, _ONE - saturation
        full = np.uint8(value * _TO_BYTE)
        low = np.uint8(max(without * value, _ZERO) * _TO_BYTE)
        falling = np.uint8(max((_ONE - part) * value, _ZERO) * _TO_BYTE)
        rising = np.uint8(max((part + without) * value, _ZERO) * _TO_BYTE)
        number = int(sector) % 6
        if number == 0:
            target[place], target[place + 1], target[place + 2] = full, rising, low
        elif number == 1:
            target[place], target[place + 1], target[place + 2] = falling, full, low
        elif number == 2:
            target[place], target[place + 1], target[place + 2] = low, full, rising
        elif number == 3:
            target[place], target[place + 1], target[place + 2] = low, falling, full
        elif number == 4:
            target[place], target[place + 1], target[place + 2] = rising, low, full
        else:
            target[place], target[place + 1], target[place + 2] = full, low, falling
