"""The same as `render`, with augmentations between the mirroring and the turn.

Apart from it, because compiling it takes many times as long. Two more things come in with each sample: the codes of
the operations stand in `numbers` after those of `LAYOUT`, and a fifth input holds their `amounts`, (K * 4,) float32.
"""

import numpy as np
from numba import carray, cfunc, njit

from pipelines.augment.operations import Operation
from pipelines.kernels import OPTIONS
from pipelines.kernels.augment import apply
from pipelines.kernels.render import (
    BYTE,
    BYTES,
    CALLED,
    FLOAT,
    FLOATS,
    LAYOUT,
    RUN_SIGNATURE,
    SHORTS,
    addresses_at,
    begin,
    write,
)
from pipelines.kernels.turn import turn
from pipelines.kernels.vectors import pointer

_AHEAD = len(LAYOUT)
_ERASE = int(Operation.ERASE)


@njit(**OPTIONS)
def _blank(erased: np.ndarray, count: int, kind: int, table: int, address: int) -> None:
    """Put the value of an erased pixel where (count,) uint8 `erased` is not 0: the mean, which is 0 when normalised."""
    if kind == FLOAT:
        floats = carray(pointer(address, FLOATS), count)
        for index in range(count):
            if erased[index]:
                floats[index] = np.float32(0)
    elif kind == BYTE:
        plain, numbers = carray(pointer(address, BYTES), count), carray(pointer(table, FLOATS), 9)
        for index in range(count):
            if erased[index]:
                plain[index] = np.uint8(numbers[6 + index % 3])
    else:
        halves = carray(pointer(address, SHORTS), count)
        for index in range(count):
            if erased[index]:
                halves[index] = np.uint16(0)


@njit(**OPTIONS)
def _augment(pixels: np.ndarray, size: int, codes: np.ndarray, amounts: np.ndarray, erased: np.ndarray) -> bool:
    """Apply the operations to `pixels` in order; mark in `erased` what is to be erased, and say whether anything is."""
    square, scratch = pixels[: size * size * 3].reshape(size, size, 3), np.empty((size, size, 3), np.uint8)
    found = False
    for slot in range(len(codes)):
        amount = amounts[4 * slot : 4 * slot + 4]
        if codes[slot] == _ERASE:
            if not found:
                erased[:] = 0
            found = True
            for row in range(int(amount[0]), int(amount[0] + amount[2])):
                start = 3 * (row * size + int(amount[1]))
                erased[start : start + 3 * int(amount[3])] = 1
        elif codes[slot] != 0:
            apply(square, int(codes[slot]), amount, scratch)
    return found


@cfunc(RUN_SIGNATURE, **CALLED)
def _run(outputs, output_shapes, output_ndims, num_outputs, inputs, shapes, ndims, num_inputs):  # type: ignore[no-untyped-def]
    given = addresses_at(inputs, num_inputs)
    size, numbers, pixels = begin(given, addresses_at(shapes, num_inputs))
    codes = numbers[_AHEAD:]
    # One byte more than the values, for a vector's end.
    erased = np.empty(size * size * 3 + 1, np.uint8)
    anything_erased = _augment(pixels, size, codes, carray(pointer(given[4], FLOATS), 4 * len(codes)), erased)
    turn(pixels, size, numbers[5], numbers[6], numbers[7], numbers[8])
    result = addresses_at(outputs, num_outputs)[0]
    write(pixels, size * size * 3, numbers[9], given[3], result)
    if anything_erased:
        turn(erased, size, numbers[5], numbers[6], numbers[7], numbers[8])
        _blank(erased, size * size * 3, numbers[9], given[3], result)


RUN: int = _run.address
