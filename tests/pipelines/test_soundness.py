import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines import masks
from pipelines.resizing import Recipe, prepare_file
from pipelines.soundness import UnsoundError, sound
from tests.pipelines.conftest import draw

FORMATS = ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "JPEG2000", "PPM"]


def encoded(form, height=40, width=50, **options):
    file = io.BytesIO()
    draw(0, height, width).save(file, form, **options)
    return file.getvalue()


def judge(data, height=40, width=50):
    return sound(data, height, width)


@pytest.mark.parametrize("form", FORMATS)
def test_a_whole_image_is_sound(form):
    judge(encoded(form))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.7, 0.99])
def test_a_truncated_image_is_not(form, share):
    data = encoded(form)
    with pytest.raises(UnsoundError):
        judge(data[: int(share * len(data))])


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"quality": 5}, {"subsampling": 0}, {"comment": b"\xff\xd9"}]
)
def test_a_jpeg_cut_anywhere_is_found_out(options):
    data = encoded("JPEG", **options)
    judge(data)
    for length in [*range(0, len(data) - 1, 7), len(data) - 1]:
        with pytest.raises(UnsoundError):
            judge(data[:length])


def test_the_end_of_a_thumbnail_is_not_taken_for_the_images():
    thumbnail, data = encoded("JPEG", 8, 8), encoded("JPEG")
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = data[:2] + segment + data[2:]
    judge(whole)
    with pytest.raises(UnsoundError, match="truncated"):
        judge(whole[:-20])


def test_what_follows_the_end_of_a_jpeg_does_not_matter():
    judge(encoded("JPEG") + bytes(1000))


def test_a_file_whose_end_is_zeros_is_found_out():
    data = encoded("JPEG")
    with pytest.raises(UnsoundError, match="truncated"):
        judge(data[:-100] + bytes(100))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "no image of a known format"),
        (b"\xff\xd8\xff\xd9", "no scan"),
        (b"\xff\xd8\x00\x00\x00\x00", "no marker at byte 2"),
    ],
)
def test_what_is_no_image_at_all_is_named(data, reason):
    with pytest.raises(UnsoundError, match=reason):
        judge(data)


@pytest.mark.parametrize("form", ["EPS", "PCX"])
def test_formats_that_run_programs_or_that_nobody_uses_are_refused(form):
    with pytest.raises(UnsoundError, match="no image of a known format"):
        judge(encoded(form))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "PPM"])
def test_ordinary_files_are_passed_on_and_not_copied(form):
    data = encoded(form)
    assert judge(data) is data


@pytest.mark.parametrize("form", FORMATS)
def test_another_size_than_was_indexed_is_found_out(form):
    with pytest.raises(UnsoundError, match="50 x 40 pixels, but was 40 x 50"):
        judge(encoded(form), 50, 40)


def test_the_check_agrees_with_a_decoder_that_is_strict():
    data = encoded("JPEG")
    with pytest.raises(OSError, match="truncated"), Image.open(io.BytesIO(data[:-200])) as image:
        image.load()
    with pytest.raises(UnsoundError):
        judge(data[:-200])


ANYTHING = [EOFError, TypeError, RuntimeError, struct.error, IndexError, KeyError, ZeroDivisionError]


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail


@pytest.mark.parametrize("error", ANYTHING)
@pytest.mark.parametrize("where", ["open", "Image.convert"])
def test_whatever_pillow_raises_on_a_file_is_a_defined_error(error, where, monkeypatch):
    # The header is read by Pillow too, and then the image decoded by it.
    data = encoded("TIFF")
    monkeypatch.setattr(f"PIL.Image.{where}", raising(error()))
    with pytest.raises(UnsoundError, match=error.__name__):
        judge(data)


@pytest.mark.parametrize("error", ANYTHING)
def test_whatever_pillow_raises_where_a_file_is_prepared_is_a_defined_error(error, monkeypatch):
    data = encoded("JPEG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", raising(error()))
    with pytest.raises(UnsoundError, match=error.__name__):
        prepare_file(data, 40, 50, Recipe(size=20))


def test_a_machine_without_memory_is_not_blamed_on_the_image(monkeypatch):
    data = encoded("TIFF")
    with monkeypatch.context() as patched:
        patched.setattr("PIL.Image.Image.convert", raising(MemoryError()))
        with pytest.raises(MemoryError):
            judge(data)
    with monkeypatch.context() as patched:
        patched.setattr("PIL.ImageFile.ImageFile.load", raising(MemoryError()))
        with pytest.raises(MemoryError):
            prepare_file(encoded("JPEG"), 40, 50, Recipe(size=20))
    monkeypatch.setattr("PIL.Image.Image.save", raising(MemoryError()))
    with pytest.raises(MemoryError):
        prepare_file(data, 40, 50, Recipe(size=20))


def test_a_fault_of_the_code_that_resizes_is_not_blamed_on_the_image(monkeypatch):
    data = encoded("JPEG")
    monkeypatch.setattr("pipelines.resizing._resized", raising(OSError("no room for what was compiled")))
    with pytest.raises(OSError, match="compiled"):
        prepare_file(data, 40, 50, Recipe(size=20))


def test_an_image_that_does_not_fit_into_the_format_is_named():
    file = io.BytesIO()
    Image.new("RGB", (66_000, 1)).save(file, "PNG")
    with pytest.raises(UnsoundError, match="cannot be written as JPEG"):
        prepare_file(file.getvalue(), 1, 66_000, Recipe(format="jpeg"))


@pytest.mark.parametrize("form", ["EPS", "TIFF", "GIF", "JPEG"])
def test_a_mask_is_a_png(form):
    file = io.BytesIO()
    Image.new("L", (8, 8), 255).save(file, form)
    with pytest.raises(ValueError, match="cannot identify"):
        masks.decode(file.getvalue())


def test_a_mask_that_declares_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", None)
    content = bytearray(masks.encode(np.ones((4, 4), bool)))
    content[16:24] = struct.pack(">II", 20_000, 20_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(ValueError, match="20000 x 20000 pixels"):
        masks.decode(bytes(content))
