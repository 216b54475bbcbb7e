import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.image_header import HeaderError, parse, read


def encoded(width: int, height: int, kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((width, height), 60).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def found(content: bytes) -> tuple[str, int, int] | None:
    header = parse(content)
    return None if header is None else header[:3]


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "1")]
)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (37, 5), (300, 1000)])
def test_size_and_format_are_what_pillow_wrote(kind: str, mode: str, width: int, height: int) -> None:
    assert found(encoded(width, height, kind, mode)) == (kind.lower(), width, height)


def test_progressive_jpegs_and_other_frame_types_are_read() -> None:
    assert found(encoded(40, 30, progressive=True)) == ("jpeg", 40, 30)
    plain = encoded(40, 30)
    frame = plain.index(b"\xff\xc0")
    assert found(plain[:frame] + b"\xff\xc9" + plain[frame + 2 :]) == ("jpeg", 40, 30)
    # C4 shares the range of the frames but is the Huffman table.
    tables = b"\xff\xd8\xff\xc4\x00\x0b\x08\x00\x05\x00\x05\x00\x00\x00\x00"
    with pytest.raises(HeaderError, match="no frame header"):
        read(io.BytesIO(tables + plain[plain.index(b"\xff\xda") :]))


def test_a_header_behind_many_large_segments_is_found() -> None:
    content = encoded(64, 48, icc_profile=bytes(300_000), exif=b"Exif\0\0" + bytes(60_000))
    assert content.index(b"\xff\xc0") > 300_000
    assert found(content) == ("jpeg", 64, 48)


def test_a_thumbnail_inside_a_segment_is_not_mistaken_for_the_image() -> None:
    assert found(encoded(64, 48, exif=b"Exif\0\0" + encoded(16, 12))) == ("jpeg", 64, 48)


def test_fill_bytes_before_a_marker_are_skipped() -> None:
    content = encoded(20, 10)
    frame = content.index(b"\xff\xc0")
    assert found(content[:frame] + b"\xff\xff\xff" + content[frame:]) == ("jpeg", 20, 10)


def test_the_stream_is_left_where_the_compressed_data_begin() -> None:
    content = encoded(500, 400)
    stream = io.BytesIO(content)
    read(stream)
    assert stream.tell() == content.index(b"\xff\xda") + 14


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_cut_of_a_file_gives_the_size_or_nothing(kind: str) -> None:
    content = encoded(33, 22, kind)
    assert {found(content[:length]) for length in [*range(700), len(content)]} == {None, (kind.lower(), 33, 22)}


@given(st.sampled_from([b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"]), st.binary(max_size=200))
def test_garbage_never_raises_and_never_gives_an_empty_size(start: bytes, rest: bytes) -> None:
    header = parse(start + rest)
    assert header is None or (header.width > 0 and header.height > 0)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA"])
def test_formats_that_run_programs_or_that_nobody_uses_are_none(kind: str) -> None:
    assert parse(encoded(8, 8, kind)) is None


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF"])
def test_other_formats_are_measured_too(kind: str) -> None:
    assert found(encoded(37, 21, kind)) == (kind.lower(), 37, 21)


def test_a_size_of_zero_is_no_size() -> None:
    content = bytearray(encoded(20, 10))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 7] = b"\0\0"
    assert parse(bytes(content)) is None
