"""The bytes that a decoder is given: whole, of the planned size, and of a kind that all decoders show alike.

Decoders do not tell reliably whether an image is whole: of a truncated file one fills the rest with grey, another
notices only if the window it was asked for reaches into what is missing. And they disagree about the rarer kinds, some
of which DALI cannot decode at all or dies of. Those are decoded here, by Pillow, and handed on as plain pixels.
"""

import io
import struct

import numpy as np
from PIL import Image

from pipelines import image_header
from pipelines.image_header import MOST_PIXELS, PILLOW_FORMATS, HeaderError, ImageHeader

JPEG_END = b"\xff\xd9"
# How EXIF's orientations are undone.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnsoundError(Exception):
    """The bytes are no whole image; the message says why, without saying where they lie."""


def sound(encoded: bytes, height: int, width: int) -> bytes:
    """What to decode instead of `encoded`: the same object, or a binary PPM of what Pillow shows, upright, in RGB.

    PPM stands in for what DALI does not decode as Pillow does: CMYK, 16 bits, animations, GIF, TIFF, unusual EXIF, ...
    Damage in the middle of the compressed data of an ordinary file goes unseen, as it does by most decoders.

    Args:
        height, width: in pixels as shown (EXIF orientation applied), as they were when the data set was indexed.

    Raises:
        UnsoundError: no image, truncated, of another size, or of more than MOST_PIXELS, decoded or not.
    """
    stream = io.BytesIO(encoded)
    try:
        header = image_header.read(stream)
    except HeaderError as error:
        raise UnsoundError(str(error)) from None
    if (header.height, header.width) != (height, width):
        raise UnsoundError(
            f"the image is {header.width} x {header.height} pixels, but was {width} x {height} when the data set was "
            "indexed"
        )
    if height * width > MOST_PIXELS:
        raise UnsoundError(
            f"the image declares {width} x {height} pixels, more than the {MOST_PIXELS:,} that are decoded; shrink it"
        )
    if header.format == "jpeg":
        # A thumbnail in the header has an end of its own.
        if encoded.rfind(JPEG_END, stream.tell()) < 0:
            raise UnsoundError("the JPEG file is truncated: its end-of-image marker is missing")
    elif header.plain:
        _check_length(encoded, header)
    return encoded if header.plain else _rewritten(encoded, header.orientation)


def _check_length(encoded: bytes, header: ImageHeader) -> None:
    """Of the formats that say how long they are; of a PNG the header reading has seen the end."""
    wanted, row = 0, 3 * header.width
    if header.format == "webp":
        wanted = struct.unpack_from("<I", encoded, 4)[0] + 8
    elif header.format == "bmp":
        wanted = struct.unpack_from("<I", encoded, 10)[0] + (row + 3) // 4 * 4 * header.height
    elif header.format == "ppm":
        wanted = row * header.height + len(f"P6 {header.width} {header.height} 255 ")
    if len(encoded) < wanted:
        raise UnsoundError(f"the {header.format.upper()} file is truncated: {len(encoded)} of {wanted} bytes")


def _rewritten(encoded: bytes, orientation: int) -> bytes:
    try:
        with Image.open(io.BytesIO(encoded), formats=PILLOW_FORMATS) as image:
            image.load()
            turn = _TURNS.get(orientation)
            upright = image if turn is None else image.transpose(turn)
            pixels = np.asarray(upright.convert("RGB"))
    except MemoryError:  # It says nothing about the image, whose size was looked at before.
        raise
    except Exception as error:  # What Pillow can raise on damaged files is not written anywhere.
        reason = str(error) or type(error).__name__
        message = "no image of a known format" if "cannot identify" in reason else f"cannot be decoded: {reason}"
        raise UnsoundError(f"the file is {message}" if message.startswith("no") else f"the file {message}") from None
    height, width = pixels.shape[:2]
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()
