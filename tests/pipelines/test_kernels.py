"""The host's kernels against torch and numpy, each alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch.nn import functional as F

from pipelines.kernels import render
from pipelines.kernels.resize import resize
from pipelines.kernels.turn import turn

MARK = 77


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized(image, size, mirrored=False, top=0, left=0, height=None, width=None):
    """Our kernel's (size, size, 3) uint8 of a window, with a check that nothing is written beyond the last vector."""
    height, width = height or image.shape[0], width or image.shape[1]
    pixels = np.full(size * size * 3 + 40, MARK, np.uint8)
    stride = image.shape[1] * 3
    resize(
        np.ascontiguousarray(image).reshape(-1)[top * stride + left * 3 :],
        height,
        width,
        stride,
        size,
        mirrored,
        pixels,
    )
    assert (pixels[size * size * 3 + 1 :] == MARK).all()
    return pixels[: size * size * 3].reshape(size, size, 3)


def torch_resized(image, size):
    """What torch makes of it: (size, size, 3) float32, not rounded."""
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float()
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


@settings(max_examples=150)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 120), st.integers(0, 99))
def test_resizing_is_torchs_antialiased_bilinear_filter_to_within_rounding(height, width, size, seed):
    image = picture(height, width, seed)
    # Half a step of 8 bits, and what sums of floats in another order differ by.
    assert np.abs(resized(image, size) - torch_resized(image, size)).max() < 0.505


@pytest.mark.parametrize(("height", "width", "size"), [(1, 1, 5), (2, 900, 7), (900, 2, 7), (3000, 3000, 8), (5, 5, 5)])
def test_extreme_shapes_are_resized_right(height, width, size):
    image = picture(height, width)
    assert np.abs(resized(image, size) - torch_resized(image, size)).max() < 0.51


def test_a_constant_image_stays_constant():
    for value in (0, 1, 127, 254, 255):
        assert (resized(np.full((97, 61, 3), value, np.uint8), 33) == value).all()


def test_mirrored_is_the_mirror_image_bit_for_bit():
    image = picture(90, 131)
    for size in (32, 131, 224):
        assert np.array_equal(resized(image, size, mirrored=True), resized(image, size)[:, ::-1])


def test_a_window_is_resized_as_if_it_were_an_image_of_its_own():
    image = picture(120, 150)
    window = image[11:100, 23:140]
    assert np.array_equal(resized(image, 48, top=11, left=23, height=89, width=117), resized(window, 48))


@settings(max_examples=100)
@given(st.data())
def test_turning_a_block_is_numpys_rot90_of_it_and_touches_nothing_else(data):
    size = data.draw(st.integers(1, 40))
    side = data.draw(st.integers(1, size))
    y, x = data.draw(st.integers(0, size - side)), data.draw(st.integers(0, size - side))
    turns = data.draw(st.integers(0, 7))
    image = picture(size, size, data.draw(st.integers(0, 9)))
    expected = image.copy()
    expected[y : y + side, x : x + side] = np.rot90(image[y : y + side, x : x + side], turns)
    pixels = np.append(image.reshape(-1), [MARK] * 9).astype(np.uint8)
    turn(pixels, size, y, x, side, turns)
    assert np.array_equal(pixels[: size * size * 3].reshape(size, size, 3), expected)
    assert (pixels[size * size * 3 :] == MARK).all()


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("window", [(-4, 3, 32, 32), (2, -3, 32, 32), (4, 4, 32, 32), (-5, -6, 45, 50), (0, 0, 32, 32)])
def test_what_lies_outside_the_image_is_black(window, flip):
    image, size = picture(32, 32), 32
    top, left, height, width = window
    around = np.pad(image, ((10, 30), (10, 30), (0, 0)))[10 + top : 10 + top + height, 10 + left : 10 + left + width]
    expected = around if (height, width) == (size, size) else resized(around, size)
    pixels = np.zeros(size * size * 3 + 1, np.uint8)
    numbers = np.array([flip, *window, 0, 0, size, 0, 0], np.int32)
    render.draw(image.reshape(-1), 32, 32, numbers, size, pixels)
    shown = pixels[:-1].reshape(size, size, 3)
    assert np.array_equal(shown[:, ::-1] if flip else shown, expected)


@njit
def call_write(pixels, kind, table, output):
    render.write(pixels, len(pixels), kind, table.ctypes.data, output.ctypes.data)


@pytest.mark.parametrize("count", [3, 48, 3 * 17 * 17])
def test_writing_floats_is_a_multiplication_and_a_sum(count):
    pixels = np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8)
    factors, offsets = np.float32([0.5, -2, 0.0172]), np.float32([1, 2.5, -1.8])
    table = np.concatenate([factors, offsets, np.zeros(3, np.float32)]).view(np.int32)
    output = np.full(count + 2, 9, np.float32)
    call_write(pixels, render.FLOAT, table, output)
    expected = pixels.reshape(-1, 3) * factors.astype(np.float64) + offsets
    assert np.abs(output[:count].reshape(-1, 3) - expected).max() < 1e-4
    assert (output[count:] == 9).all()
