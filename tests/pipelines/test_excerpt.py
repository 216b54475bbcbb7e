"""The part of a JPEG file that a window needs, against Pillow's decoding of the whole file."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from pipelines.kernels.excerpt import excerpts

rng = np.random.default_rng(7)
photograph = Image.fromarray(data.chelsea())


def encoded(image: Image.Image, **options: object) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def decoded(file: np.ndarray, window: np.ndarray) -> np.ndarray:
    top, left, height, width = (int(number) for number in window)
    return np.asarray(Image.open(io.BytesIO(file.tobytes())))[top : top + height, left : left + width]


def random_window(height: int, width: int) -> list[int]:
    tall, wide = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
    return [int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1)), tall, wide]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(
    "markers", [{"restart_marker_rows": 1}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 2}]
)
def test_a_window_of_the_excerpt_is_to_the_bit_that_of_the_file(mode, subsampling, markers):
    options = markers | ({} if mode == "L" else {"subsampling": subsampling})
    num_cut = 0
    for _ in range(40):
        width, height = (int(side) for side in rng.integers(17, 300, 2))
        file = encoded(photograph.resize((width, height)).convert(mode), **options)
        window = random_window(height, width)
        (cut,), (moved,) = excerpts([file], np.array([window]))
        num_cut += cut is not file
        assert np.array_equal(decoded(cut, moved), decoded(file, np.array(window)))
        assert len(cut) <= len(file)
    assert num_cut >= 8


def test_a_corner_of_a_large_file_is_a_small_file():
    file = encoded(photograph, restart_marker_blocks=1)
    (cut,), (moved,) = excerpts([file], np.array([[150, 300, 60, 60]]))
    with Image.open(io.BytesIO(cut.tobytes())) as image:
        # The blocks of 16 that hold the window and three pixels around it.
        assert image.size == (368 - 288, 224 - 144)
        assert image.info["jfif"]
    assert moved.tolist() == [6, 12, 60, 60]
    assert len(cut) < len(file) / 8


def test_several_files_of_all_kinds_are_cut_each_by_itself():
    files, windows = [], []
    for number in range(12):
        options = {"restart_marker_blocks": 1} if number % 3 else {}
        files.append(encoded(photograph.resize((200 + number, 150)), **options))
        windows.append([40, 50, 60 + number, 70])
    cut, moved = excerpts(files, np.array(windows))
    for number, (given, part) in enumerate(zip(files, cut, strict=True)):
        assert (part is given) == (number % 3 == 0)
        assert np.array_equal(decoded(part, moved[number]), decoded(given, np.array(windows[number])))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"restart_marker_blocks": 1, "progressive": True},
        {"restart_marker_blocks": 7},
        {"restart_marker_blocks": 1, "exif": Image.Exif()},
    ],
    ids=["no markers", "progressive", "intervals across rows", "EXIF"],
)
def test_what_cannot_be_cut_is_left_as_it_is(options):
    if "exif" in options:
        options["exif"][0x0112] = 6
    file = encoded(photograph.resize((320, 240)), **options)
    (cut,), (moved,) = excerpts([file], np.array([[100, 100, 50, 50]]))
    assert cut is file
    assert moved.tolist() == [100, 100, 50, 50]


def test_a_window_of_all_columns_from_the_top_costs_no_copy():
    file = encoded(photograph.resize((320, 240)), restart_marker_blocks=1)
    (cut,), _ = excerpts([file], np.array([[0, 0, 100, 320]]))
    assert cut is file


def test_damaged_files_are_left_to_the_decoder_and_nothing_outside_them_is_read():
    whole = encoded(photograph.resize((160, 120)), restart_marker_blocks=1)
    windows = np.array([[40, 40, 60, 60]])
    for length in range(0, len(whole), 7):
        # In the middle of a larger array: what was read beyond the file's end would be these bytes.
        around = np.full(length + 64, 0xD0, np.uint8)
        around[:length] = whole[:length]
        (cut,), (moved,) = excerpts([around[:length]], windows)
        if cut.base is not around:
            assert np.array_equal(decoded(cut, moved), decoded(whole, windows[0]))
    for _ in range(400):
        damaged = whole.copy()
        damaged[rng.integers(2, len(whole), 3)] = rng.integers(0, 256, 3)
        (cut,), (moved,) = excerpts([damaged], windows)
        assert len(cut) <= len(damaged)
        assert moved[0, 2:].tolist() == [60, 60] if moved.ndim == 2 else moved[2:].tolist() == [60, 60]


def test_a_missing_marker_is_noticed():
    file = encoded(photograph.resize((160, 120)), restart_marker_blocks=1)
    places = np.flatnonzero((file[:-1] == 0xFF) & (file[1:] >= 0xD0) & (file[1:] <= 0xD7))
    broken = np.delete(file, [places[3], places[3] + 1])
    (cut,), _ = excerpts([broken], np.array([[40, 40, 60, 60]]))
    assert cut is broken


def test_no_files_make_no_excerpts():
    cut, moved = excerpts([], np.zeros((0, 4), np.int64))
    assert cut == []
    assert moved.shape == (0, 4)
