"""One sample from its decoded window to the network's input, in one call: what DALI's graph runs on the host.

Cut, resize, mirror, turn and normalise pass over the pixels while they lie in the processor's caches; as
operators of their own, each would send the batch through memory again. `RUN` is the address of a function that DALI's
`NumbaFuncImpl` calls for each sample, on its own threads and without the interpreter; `SETUP` tells it the shape of the
output. Their arguments are DALI's: addresses of arrays of addresses of data and shapes.

A sample's inputs:
    the decoded image (H, W, 3) uint8,
    `numbers` int32, in the order of `LAYOUT`,
    `canvas` (size,) uint8, of which only the length counts,
    `table` int32, the bits of nine float32 (what to multiply R, G, B with, what to add, what an erased pixel is) and,
    for halves, of all 256 values of R, of G and of B.
"""

import numpy as np
from numba import carray, cfunc, njit, types

from pipelines.kernels import OPTIONS
from pipelines.kernels.resize import resize
from pipelines.kernels.turn import turn
from pipelines.kernels.vectors import pointer, settle, stream_scaled

# Where things stand in `numbers`.
LAYOUT = ("flip", "top", "left", "height", "width", "box_y", "box_x", "box_side", "turns", "kind")
# The output's type, `kind` in `numbers`: halves are looked up, for Numba has none.
FLOAT, BYTE, HALF = 0, 1, 2
# Floats in `table` before the halves.
AHEAD = 9

# From so many values an image on, a batch is more than the caches hold, and what is written goes past them: a processor
# reads what it writes to otherwise, from memory, only to overwrite it.
STREAMED = 65_536

ADDRESSES = np.empty(0, np.uint64)
BYTES = np.empty(0, np.uint8)
SHORTS = np.empty(0, np.uint16)
_INTEGERS = np.empty(0, np.int32)
_LENGTHS = np.empty(0, np.int64)
FLOATS = np.empty(0, np.float32)
CALLED = {name: value for name, value in OPTIONS.items() if name in ("cache", "fastmath", "error_model", "boundscheck")}


@njit(**OPTIONS)
def addresses_at(address: int, count: int) -> np.ndarray:
    return carray(pointer(address, ADDRESSES), count)


@njit(**OPTIONS)
def shape_at(addresses: np.ndarray, index: int, ndim: int) -> np.ndarray:
    return carray(pointer(addresses[index], _LENGTHS), ndim)


@njit(**OPTIONS)
def draw(image: np.ndarray, height: int, width: int, numbers: np.ndarray, size: int, pixels: np.ndarray) -> None:
    """The sample's window, resized and mirrored, as (size * size * 3 + 1,) uint8 `pixels`; black outside the image.

    Args:
        image: (height * width * 3,) uint8, interleaved rows.
        numbers: in the order of `LAYOUT`.
    """
    flip, top, left, tall, wide = numbers[0] != 0, numbers[1], numbers[2], numbers[3], numbers[4]
    if top < 0 or left < 0 or top + tall > height or left + wide > width:
        padded = np.zeros(tall * wide * 3, np.uint8)
        for row in range(max(0, -top), min(tall, height - top)):
            first, last = max(0, -left), min(wide, width - left)
            for index in range(3 * first, 3 * last):
                padded[row * wide * 3 + index] = image[((top + row) * width + left) * 3 + index]
        image, height, width, top, left = padded, tall, wide, 0, 0
    start = (top * width + left) * 3
    if tall == size and wide == size:
        for row in range(size):
            source, target = start + row * width * 3, row * size * 3
            if flip:
                for column in range(size):
                    for channel in range(3):
                        pixels[target + 3 * column + channel] = image[source + 3 * (size - 1 - column) + channel]
            else:
                for index in range(3 * size):
                    pixels[target + index] = image[source + index]
    else:
        resize(image[start:], tall, wide, width * 3, size, flip, pixels)


@njit(**OPTIONS)
def write(pixels: np.ndarray, count: int, kind: int, table: int, address: int) -> None:
    """Normalise `count` uint8 values of interleaved RGB into the output; `table` and `address` tell where those lie."""
    if kind == FLOAT:
        floats, numbers = carray(pointer(address, FLOATS), count), carray(pointer(table, FLOATS), 6)
        # The period of three would keep the loop from being vectorised.
        tile = 48
        factors, offsets = np.empty(tile, np.float32), np.empty(tile, np.float32)
        for index in range(tile):
            factors[index], offsets[index] = numbers[index % 3], numbers[3 + index % 3]
        whole = count // tile
        streams = count >= STREAMED and address % 16 == 0
        if streams:
            for start in range(0, whole * tile, tile):
                for part in range(0, tile, 16):
                    stream_scaled(pixels, start + part, factors, offsets, part, floats, start + part)
            settle()
        for block in range(0 if streams else whole):
            values, results = pixels[block * tile : (block + 1) * tile], floats[block * tile : (block + 1) * tile]
            for index in range(tile):
                results[index] = np.float32(values[index]) * factors[index] + offsets[index]
        for index in range(whole * tile, count):
            floats[index] = np.float32(pixels[index]) * numbers[index % 3] + numbers[3 + index % 3]
    elif kind == BYTE:
        plain = carray(pointer(address, BYTES), count)
        for index in range(count):
            plain[index] = pixels[index]
    else:
        halves, known = carray(pointer(address, SHORTS), count), carray(pointer(table + 4 * AHEAD, SHORTS), 768)
        for place in range(0, count, 3):
            halves[place] = known[pixels[place]]
            halves[place + 1] = known[256 + pixels[place + 1]]
            halves[place + 2] = known[512 + pixels[place + 2]]


@njit(**OPTIONS)
def begin(inputs: np.ndarray, shapes: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Side of the output, `numbers`, and the window drawn as (size * size * 3 + 1,) uint8."""
    shape = shape_at(shapes, 0, 3)
    image = carray(pointer(inputs[0], BYTES), shape[0] * shape[1] * 3)
    numbers = carray(pointer(inputs[1], _INTEGERS), shape_at(shapes, 1, 1)[0])
    size = shape_at(shapes, 2, 1)[0]
    pixels = np.empty(size * size * 3 + 1, np.uint8)
    draw(image, shape[0], shape[1], numbers, size, pixels)
    return size, numbers, pixels


RUN_SIGNATURE = types.void(
    *(types.uint64, types.uint64, types.uint64, types.int32), *(types.uint64, types.uint64, types.uint64, types.int32)
)
_SETUP_SIGNATURE = types.void(
    *(types.uint64, types.uint64, types.int32), *(types.uint64, types.uint64, types.int32), types.int32
)


@cfunc(RUN_SIGNATURE, **CALLED)
def _run(outputs, output_shapes, output_ndims, num_outputs, inputs, shapes, ndims, num_inputs):  # type: ignore[no-untyped-def]
    given = addresses_at(inputs, num_inputs)
    size, numbers, pixels = begin(given, addresses_at(shapes, num_inputs))
    turn(pixels, size, numbers[5], numbers[6], numbers[7], numbers[8])
    write(pixels, size * size * 3, numbers[9], given[3], addresses_at(outputs, num_outputs)[0])


@cfunc(_SETUP_SIGNATURE, **CALLED)
def _setup(output_shapes, output_ndims, num_outputs, shapes, ndims, num_inputs, num_samples):  # type: ignore[no-untyped-def]
    # Shapes lie input by input, sample by sample; the third input is the canvas.
    every = addresses_at(shapes, num_inputs * num_samples)
    results = addresses_at(output_shapes, num_samples)
    for sample in range(num_samples):
        result = shape_at(results, sample, 3)
        size = shape_at(every, 2 * num_samples + sample, 1)[0]
        result[0], result[1], result[2] = size, size, 3


RUN: int = _run.address
SETUP: int = _setup.address
