"""Is an encoded image whole? Found from its structure, without decoding it.

Decoders do not tell reliably: of a truncated file one fills the rest with grey, another notices only if the window it
was asked for reaches into what is missing.
"""

import io
import struct

import numpy as np
from PIL import Image

JPEG_END = b"\xff\xd9"
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND\xaeB`\x82"
# Start-of-frame markers: C0 to CF but for the tables DHT (C4), JPG (C8) and DAC (CC).
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
START_OF_SCAN = 0xDA
END_OF_IMAGE = 0xD9
WITHOUT_LENGTH = frozenset([0x01, *range(0xD0, 0xD8)])
# What DALI decodes besides JPEG, PNG, BMP and WebP.
DECODED_WHOLE = ("TIFF", "JPEG2000", "PPM")


class UnsoundError(Exception):
    """The bytes are no whole image; the message says why, without saying where they lie."""


def check(encoded: np.ndarray, height: int, width: int) -> None:
    """Raise UnsoundError unless (n,) uint8 `encoded` is a whole image of that height and width in pixels.

    Damage in the middle of the compressed data goes unseen, as it does by most decoders.
    """
    data = encoded.tobytes()
    if not data:
        raise UnsoundError("the file is empty")
    try:
        found = _size(data)
    except (struct.error, IndexError):
        raise UnsoundError("the file is truncated: it ends within its header") from None
    if found != (height, width):
        raise UnsoundError(
            f"the image is {found[1]} x {found[0]} pixels, but was {width} x {height} when the data set was indexed"
        )


def _size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels of a whole image."""
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data.startswith(PNG_START):
        if data.rfind(PNG_END) < 0:
            raise UnsoundError("the PNG file is truncated: its last chunk, IEND, is missing")
        width, height = struct.unpack_from(">II", data, 16)
        return height, width
    if data.startswith(b"BM"):
        (declared,) = struct.unpack_from("<I", data, 2)
        if len(data) < declared:
            raise UnsoundError(f"the BMP file is truncated: {len(data)} of {declared} bytes")
        width, height = struct.unpack_from("<ii", data, 18)
        return abs(height), width
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        (declared,) = struct.unpack_from("<I", data, 4)
        if len(data) < declared + 8:
            raise UnsoundError(f"the WebP file is truncated: {len(data)} of {declared + 8} bytes")
    return _decoded(data)


def _jpeg(data: bytes) -> tuple[int, int]:
    """Walk the segments up to the first scan, then look for the end after it: a thumbnail before it has its own end."""
    position, size = 2, None
    while True:
        if data[position] != 0xFF:
            raise UnsoundError(f"the JPEG file is damaged: no marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker in WITHOUT_LENGTH:
            position += 2
            continue
        if marker == END_OF_IMAGE:
            raise UnsoundError("the JPEG file is damaged: it holds no scan")
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker in FRAMES:
            size = struct.unpack_from(">HH", data, position + 5)
        position += 2 + length
        if marker == START_OF_SCAN:
            break
    if size is None:
        raise UnsoundError("the JPEG file is damaged: it holds no frame header")
    if data.rfind(JPEG_END, position) < 0:
        raise UnsoundError("the JPEG file is truncated: its end-of-image marker is missing")
    height, width = size
    return height, width


def _decoded(data: bytes) -> tuple[int, int]:
    """Decode the formats whose structure is not looked at above."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in (*DECODED_WHOLE, "WEBP"):
                raise UnsoundError(f"{image.format} images are not supported; convert it to JPEG or PNG")
            if image.format != "WEBP":
                image.load()
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = "no image of a known format" if "cannot identify" in str(error) else f"cannot be decoded: {error}"
        raise UnsoundError(f"the file is {message}" if message.startswith("no") else f"the file {message}") from None
