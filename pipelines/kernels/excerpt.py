"""The part of a JPEG file that a window needs, cut out of the compressed data without decoding anything.

Restart markers (ITU-T T.81, B.2.1 and E.2.4) divide a scan into intervals that can be decoded each by itself. Where
every row of blocks is a whole number of intervals, those that a window touches make a smaller JPEG file of their own,
whose pixels are those of the large one: bit for bit, if what is beside the window comes along as far as a decoder's
interpolation of colours looks (`MARGIN`). Decoding the entropy-coded data is most of the work of decoding, and without
this it is done for all that lies above, left and right of the window as well.

Files without such markers, progressive ones, those with EXIF data (windows count in upright pixels) and whatever is
unusual or damaged are left as they are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit

from pipelines.kernels import OPTIONS
from pipelines.kernels.vectors import copy_bytes, has_byte_255, pointer

# Pixels that triangular interpolation of halved colour planes looks beyond a pixel, and one more.
MARGIN = 3
_BYTES = np.empty(0, np.uint8)
_SOF0, _SOF1, _DHT, _SOF15 = 0xC0, 0xC1, 0xC4, 0xCF
_RST0, _EOI, _SOS, _DRI, _APP1 = 0xD0, 0xD9, 0xDA, 0xDD, 0xE1


def excerpts(files: Sequence[np.ndarray], windows: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """What to decode instead of `files`, and where the windows lie in that.

    Args:
        files: (bytes,) uint8 each; encoded images of any format, whole.
        windows: (N, 4) as (top, left, height, width), pixels, inside the images.

    Returns:
        Views of one buffer, or the arrays that were given; and (N, 4) int32.
    """
    count = len(files)
    addresses = np.fromiter((file.__array_interface__["data"][0] for file in files), np.uint64, count)
    lengths = np.fromiter((len(file) for file in files), np.int64, count)
    moved = np.ascontiguousarray(windows, np.int32).copy()
    starts = np.cumsum(lengths) - lengths
    buffer = np.empty(lengths.sum(), np.uint8)
    taken = np.zeros(count, np.int64)
    _cut_all(addresses, lengths, starts, moved, buffer, taken)
    cut = [
        buffer[start : start + length] if length else file
        for file, start, length in zip(files, starts.tolist(), taken.tolist(), strict=True)
    ]
    return cut, moved


@njit(**OPTIONS)
def _cut_all(
    addresses: np.ndarray,
    lengths: np.ndarray,
    starts: np.ndarray,
    windows: np.ndarray,
    buffer: np.ndarray,
    taken: np.ndarray,
) -> None:
    for index in range(len(addresses)):
        file = carray(pointer(addresses[index], _BYTES), lengths[index])
        room = buffer[starts[index] : starts[index] + lengths[index]]
        taken[index] = cut(file, windows[index], room)


@njit(**OPTIONS)
def cut(file: np.ndarray, window: np.ndarray, result: np.ndarray) -> int:
    """Write the excerpt of one file into `result`, as long as the file, and move `window` into it.

    Returns:
        The excerpt's length; 0 if there is none, and then neither has a meaning, and `window` is as it was.
    """
    frame, interval, data = _header(file)
    if data == 0 or interval == 0:
        return 0
    height, width = _short(file, frame + 1), _short(file, frame + 3)
    num_colours = _byte(file, frame + 5)
    across = down = 1
    for colour in range(num_colours):
        factors = _byte(file, frame + 7 + 3 * colour)
        across, down = max(across, factors >> 4), max(down, factors & 15)
    if across > 2 or down > 2 or (num_colours == 1 and across * down > 1):
        return 0
    columns, rows = (width + 8 * across - 1) // (8 * across), (height + 8 * down - 1) // (8 * down)
    if columns % interval:
        return 0
    wide, tall = 8 * across * interval, 8 * down
    cells = columns // interval
    left, right = max(0, window[1] - MARGIN) // wide, min(width - 1, window[1] + window[3] - 1 + MARGIN) // wide
    top, bottom = max(0, window[0] - MARGIN) // tall, min(height - 1, window[0] + window[2] - 1 + MARGIN) // tall
    if top < 0 or bottom >= rows or right >= cells or (top == 0 and left == 0 and right == cells - 1):
        # The decoder itself stops below the window.
        return 0
    copy_bytes(file, 0, result, 0, data)
    new_height = min(height - top * tall, (bottom - top + 1) * tall)
    new_width = min(width - left * wide, (right - left + 1) * wide)
    result[frame + 1], result[frame + 2] = new_height >> 8, new_height & 255
    result[frame + 3], result[frame + 4] = new_width >> 8, new_width & 255
    place = _copy_intervals(file, data, cells, left, right, top, bottom, rows * cells - 1, result)
    if place:
        window[0] -= top * tall
        window[1] -= left * wide
    return place


@njit(**OPTIONS)
def _copy_intervals(
    file: np.ndarray,
    data: int,
    cells: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
    last: int,
    result: np.ndarray,
) -> int:
    """Copy the cells of a rectangle, numbered anew; returns the file's end, or 0 if the data are not as declared."""
    place, length = data, len(file)
    row = column = interval = written = 0
    begin = at = data
    while at < length - 1:
        if at + 16 <= length and not has_byte_255(file, at):
            at += 16
            continue
        code = _byte(file, at + 1)
        if file[at] != 0xFF or code == 0 or code == 0xFF:
            # Data, a 255 among them, or a byte that only fills up.
            at += 1
            continue
        is_end = interval == last
        if code != (_EOI if is_end else _RST0 + interval % 8):
            return 0
        if top <= row and left <= column <= right:
            if written:
                result[place], result[place + 1] = 0xFF, _RST0 + (written - 1) % 8
                place += 2
            copy_bytes(file, begin, result, place, at - begin)
            place += at - begin
            written += 1
            if row == bottom and column == right:
                result[place], result[place + 1] = 0xFF, _EOI
                return place + 2
        at += 2
        begin = at
        interval += 1
        column += 1
        if column == cells:
            column = 0
            row += 1
    return 0


@njit(**OPTIONS)
def _byte(file: np.ndarray, at: int) -> Any:
    # Signed: of an unsigned number and a signed one Numba makes a float.
    return np.int64(file[at])


@njit(**OPTIONS)
def _short(file: np.ndarray, at: int) -> Any:
    return _byte(file, at) << 8 | _byte(file, at + 1)


@njit(**OPTIONS)
def _header(file: np.ndarray) -> tuple[int, int, int]:
    """Where the frame's parameters lie, the restart interval, and where the data begin; zeros if it is unusual."""
    frame = interval = 0
    at, length = 2, len(file)
    if length < 4 or file[0] != 0xFF or file[1] != 0xD8:
        return 0, 0, 0
    while at + 4 <= length and file[at] == 0xFF:
        code, size = _byte(file, at + 1), _short(file, at + 2)
        if size < 2 or at + 2 + size > length or code == _APP1:
            return 0, 0, 0
        if code in (_SOF0, _SOF1):
            if frame or size < 8 or file[at + 4] != 8 or size != 8 + 3 * _byte(file, at + 9):
                return 0, 0, 0
            frame = at + 4
        elif _SOF0 <= code <= _SOF15 and code != _DHT:
            return 0, 0, 0
        elif code == _DRI:
            if size != 4:
                return 0, 0, 0
            interval = _short(file, at + 4)
        elif code == _SOS:
            # One scan of all colours, or it is not the last.
            whole = frame and size > 2 and file[at + 4] == file[frame + 5]
            return (frame, interval, at + 2 + size) if whole else (0, 0, 0)
        elif code < _SOF0:
            return 0, 0, 0
        at += 2 + size
    return 0, 0, 0
