"""Masks as run lengths against pycocotools, and strings that its compiled code would read beyond the end of."""

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as official

from pipelines import run_lengths


def masks_of(seed: int, count: int, height: int, width: int) -> np.ndarray:
    """Blobs, single pixels, everything and nothing."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    found = [np.zeros((height, width), bool), np.ones((height, width), bool), generator.random((height, width)) < 0.5]
    for _ in range(count):
        y, x, radius = generator.integers(0, height), generator.integers(0, width), generator.integers(1, height + 1)
        found.append((rows - y) ** 2 + (columns - x) ** 2 < radius**2)
    return np.stack(found)


@pytest.mark.parametrize("size", [(1, 1), (37, 52), (480, 3)])
def test_masks_go_both_ways_as_with_pycocotools(size: tuple[int, int]) -> None:
    masks = masks_of(0, 8, *size)
    runs = run_lengths.encode(masks)
    theirs = official.encode(np.asfortranarray(masks.astype(np.uint8).transpose(1, 2, 0)))
    assert runs == [found["counts"] for found in theirs]
    back = run_lengths.decode(runs, *size)
    assert back.flags["C_CONTIGUOUS"]
    assert (back == masks).all()
    assert run_lengths.areas(runs).tolist() == masks.sum(axis=(1, 2)).tolist()
    assert [run_lengths.checked(own, *size) for own in runs] == runs


def test_masks_are_sampled_at_the_centres_of_pixels() -> None:
    generator = np.random.default_rng(3)
    for _ in range(100):
        source, size = generator.integers(1, 60, 2).tolist(), generator.integers(1, 60, 2).tolist()
        masks = generator.random((3, *source)) < 0.5
        found = run_lengths.sampled(run_lengths.encode(masks), source, size)
        assert found.shape == (3, *size)
        for row, column in np.ndindex(*size):
            # Fractions: nothing is rounded.
            centre = [Fraction(2 * place + 1, 2 * new) for place, new in zip((row, column), size, strict=True)]
            y, x = (math.floor(part * old) for part, old in zip(centre, source, strict=True))
            assert (found[:, row, column] == masks[:, y, x]).all()
    assert run_lengths.sampled([], [4, 5], [8, 10]).shape == (0, 8, 10)


def test_sampling_holds_one_mask_at_a_time_at_the_size_of_its_source() -> None:
    runs = run_lengths.encode(np.ones((1, 2000, 2000), bool)) * 20
    tracemalloc.start()
    try:
        run_lengths.sampled(runs, [2000, 2000], [40, 40])
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Bytes: one plane, and what is taken of it. All at once they would be 80 MB and more.
    assert 4e6 <= most < 12e6


def test_no_masks_are_no_masks() -> None:
    assert run_lengths.encode(np.zeros((0, 4, 5), bool)) == []
    assert run_lengths.decode([], 4, 5).shape == (0, 4, 5)


def test_polygons_are_filled_as_pycocotools_fills_them() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        height, width = (int(side) for side in generator.integers(3, 90, 2))
        # Some corners lie outside of the image.
        polygons = [
            (generator.uniform(-10, 100, (corners, 2))).reshape(-1).tolist() for corners in generator.integers(3, 9, 2)
        ][: int(generator.integers(1, 3))]
        expected = official.merge(official.frPyObjects(polygons, height, width))
        assert run_lengths.from_polygons(polygons, height, width) == expected["counts"]


def test_plain_run_lengths_are_compressed_as_pycocotools_does() -> None:
    for mask in masks_of(2, 6, 33, 21):
        flat = mask.reshape(-1, order="F")
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(int)))
        counts = np.diff([0, *edges.tolist(), flat.size]).tolist()
        expected = official.frPyObjects({"size": [33, 21], "counts": counts}, 33, 21)["counts"]
        assert run_lengths.from_counts(counts, 33, 21) == expected
        assert (run_lengths.decode([expected], 33, 21)[0] == mask).all()


@pytest.mark.parametrize("counts", [[5, 5], [-1, 13], [4, 8.0], [True, 11], [2**70, 12 - 2**70]])
def test_plain_run_lengths_that_do_not_fill_the_image_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="run lengths"):
        run_lengths.from_counts(counts, 3, 4)


def test_polygons_that_would_take_all_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="outlines"):
        run_lengths.from_polygons([[0, 0, 1e9, 0, 1e9, 1e9]], 100, 100)
    # However large the image says it is: this outline would take 43 GB.
    with pytest.raises(ValueError, match="300000000 pixels long, of which at most 20000000 are drawn"):
        run_lengths.from_polygons([[0, 0, 1e8, 0, 1e8, 1e8]], 13000, 13000)
    with pytest.raises(ValueError, match="outlines"):
        run_lengths.from_polygons([[0, 0, float("nan"), 0, 1, 1]], 100, 100)
    with pytest.raises(ValueError, match="pairs"):
        run_lengths.from_polygons([[0, 0, 1, 0, 1, 1, 2]], 100, 100)


def test_polygons_of_two_corners_enclose_nothing() -> None:
    assert run_lengths.from_polygons([[0, 0, 5, 5]], 10, 10) == b""
    triangle = [1.0, 1.0, 8.0, 1.0, 8.0, 8.0]
    assert run_lengths.from_polygons([[0, 0, 5, 5], triangle], 10, 10) == run_lengths.from_polygons([triangle], 10, 10)


@given(st.binary(max_size=40))
def test_only_strings_that_fill_the_image_get_to_the_compiled_code(runs: bytes) -> None:
    try:
        run_lengths.checked(runs, 6, 7)
    except ValueError:
        return
    assert run_lengths.decode([runs], 6, 7).shape == (1, 6, 7)


@pytest.mark.parametrize("runs", [b"", b"P", b"ooooo", b"\xff\xff", b"0", b"PPPPPPPPP0", b"1 "])
def test_a_string_that_is_cut_or_garbled_is_refused(runs: bytes) -> None:
    with pytest.raises(ValueError, match="run lengths"):
        run_lengths.checked(runs, 6, 7)
