"""Width, height and format of an image from its first bytes; nothing is decoded.

Sources: ITU-T T.81 (JPEG), annex B; PNG (ISO/IEC 15948), section 11.2.2.
"""

import io
import struct
from typing import BinaryIO, NamedTuple

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Frame headers SOF0 to SOF15, without DHT (C4), JPG (C8) and DAC (CC), which share their range.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers that stand alone, without a length: TEM, RST0 to RST7, SOI.
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})
_END = frozenset({0xD9, 0xDA})
# A header lies behind at most this many segments (ICC profiles come in up to 255 of them); more is garbage.
_MAX_SEGMENTS = 2000


class ImageHeader(NamedTuple):
    """What the first bytes of a file say: format "jpeg" or "png", stored width and height (EXIF turns not applied)."""

    format: str
    width: int
    height: int


def parse(content: bytes) -> ImageHeader | None:
    """The header of an encoded image, or None if these bytes hold none (another format, garbage, cut too early)."""
    return parse_stream(io.BytesIO(content))


def parse_stream(stream: BinaryIO) -> ImageHeader | None:
    """As `parse`, reading (and seeking in) a stream from its start no farther than the header goes.

    The format is told by the content, never by the name: ImageNet holds a PNG that is called .JPEG.
    """
    start = stream.read(2)
    header = None
    if start == b"\xff\xd8":
        header = _jpeg(stream)
    elif start == PNG_SIGNATURE[:2]:
        header = _png(stream)
    return header if header and header.width > 0 and header.height > 0 else None


def _png(stream: BinaryIO) -> ImageHeader | None:
    rest = stream.read(22)
    if len(rest) < 22 or rest[:6] != PNG_SIGNATURE[2:] or rest[6:14] != b"\x00\x00\x00\x0dIHDR":
        return None
    width, height = struct.unpack(">II", rest[14:])
    # PNG sizes are limited to 31 bits.
    return ImageHeader("png", width, height) if max(width, height) < 2**31 else None


def _jpeg(stream: BinaryIO) -> ImageHeader | None:
    for _ in range(_MAX_SEGMENTS):
        marker = stream.read(2)
        if len(marker) < 2 or marker[0] != 0xFF:
            return None
        code = marker[1]
        # Any number of fill bytes FF may precede a marker's code.
        while code == 0xFF:
            following = stream.read(1)
            if not following:
                return None
            code = following[0]
        if code in _BARE:
            continue
        length = stream.read(2)
        if code in _END or code == 0 or len(length) < 2:
            return None
        size = int.from_bytes(length, "big")
        if code in _FRAMES:
            frame = stream.read(5)
            if size < 8 or len(frame) < 5:
                return None
            height, width = struct.unpack(">HH", frame[1:])
            return ImageHeader("jpeg", width, height)
        if size < 2:
            return None
        stream.seek(size - 2, io.SEEK_CUR)
    return None
