"""Format and size of an image, as it is shown, from its header; nothing is decoded.

Sources: ITU-T T.81 (JPEG), annex B; PNG (ISO/IEC 15948), section 11; Google's WebP container and RFC 6386, 9649;
TIFF 6.0, section 2, for the EXIF block; where these leave a choice, what Pillow does (it is what torchvision shows).
"""

import io
import re
import struct
from typing import BinaryIO, NamedTuple

from PIL import Image

# Pillow knows formats that run other programs or pull in other files; data sets hold none of them.
PILLOW_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Where Pillow refuses an image as a decompression bomb. Declared pixels are counted before anything is decoded.
MOST_PIXELS = 178_956_970

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Frame headers SOF0 to SOF15, without DHT (C4), JPG (C8) and DAC (CC), which share their range.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
# Codes no length follows: TEM, RST0 to RST7, SOI, EOI, the fill byte FF, and 00, which is no marker at all.
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xDA), 0xFF})
_APP1, _SCAN, _END = 0xE1, 0xDA, 0xD9
_READ = _FRAMES | {_APP1, _SCAN}
# More parts than any real header has: 255 segments of an ICC profile, an IDAT chunk for each row of a large PNG.
_MAX_SEGMENTS = 2000
_MAX_CHUNKS = 200_000
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
# Bytes of the types of TIFF values; types beyond them have no size that readers agree on.
_TIFF_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4)
_ORIENTATION, _SHORT = 0x0112, 3
# By the first bytes: how a number, a short one and an entry of a directory are written, and where in its four bytes an
# entry's single short value stands.
_TIFF_ORDERS = {
    b"II*\0": (struct.Struct("<I"), struct.Struct("<H"), struct.Struct("<HHII"), 0),
    b"MM\0*": (struct.Struct(">I"), struct.Struct(">H"), struct.Struct(">HHII"), 16),
}
_PPM = re.compile(rb"P6[ \t\r\n]+([0-9]{1,9})[ \t\r\n]+([0-9]{1,9})[ \t\r\n]+255[ \t\r\n]")


class ImageHeader(NamedTuple):
    """What the header of an encoded image says.

    Attributes:
        format: "jpeg", "png", "webp", ..., as Pillow calls it, told by the content.
        width, height: in pixels, of the image as it is shown: EXIF orientations 5 to 8 exchange the stored ones.
        orientation: EXIF's 1 to 8: how a decoder that leaves it to the caller must turn the picture.
        plain: DALI shows it exactly as Pillow does, orientation included; measured in tests/pipelines/test_odd_images.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    plain: bool = True


class HeaderError(Exception):
    """The bytes hold no whole header; the message says why, as in "the file is truncated"."""


def parse(content: bytes) -> ImageHeader | None:
    """The header of an encoded image, or None if these bytes hold none (no image, damaged, cut too early)."""
    try:
        return read(io.BytesIO(content))
    except HeaderError:
        return None


def read(stream: BinaryIO) -> ImageHeader:
    """The header of a seekable stream, from its start; of a JPEG it is left where the first scan's data begin.

    Raises:
        HeaderError: there is none.
    """
    stream.seek(0)
    start = stream.read(2)
    if start == b"\xff\xd8":
        header = _jpeg(stream)
    else:
        start += stream.read(32)
        if start.startswith(PNG_SIGNATURE):
            header = _png(stream, start)
        elif start:
            header = _bmp(start) or _webp(start) or _ppm(start) or _with_pillow(stream)
        else:
            raise HeaderError("the file is empty")
    if header.width <= 0 or header.height <= 0:
        raise HeaderError(f"the image has {header.width} x {header.height} pixels")
    return header


def _jpeg(stream: BinaryIO) -> ImageHeader:
    frame, form = b"", 0
    exif: list[bytes] = []
    xmp = b""
    fetch, skip = stream.read, stream.seek
    for _ in range(_MAX_SEGMENTS):
        head = fetch(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in _WITHOUT_LENGTH:
            head = _next_segment(stream, head)
        marker, size = head[1], (head[2] << 8 | head[3]) - 2
        if marker not in _READ:
            skip(size, io.SEEK_CUR)
            continue
        content = fetch(size)
        if size < 0 or len(content) < size:
            raise HeaderError("the file is truncated: it ends within its header")
        if marker == _SCAN:
            break
        if marker != _APP1:
            frame, form = content, marker
        elif content.startswith(b"Exif\0\0"):
            exif.append(content[6:])
        elif content.startswith(_XMP):
            xmp = content
    else:
        raise HeaderError(f"the JPEG file is damaged: more than {_MAX_SEGMENTS} segments before its first scan")
    if len(frame) < 6:
        raise HeaderError("the JPEG file is damaged: it holds no frame header")
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    # What is left to Pillow: arithmetic coding and frames that hardly a decoder knows, CMYK in its many variants.
    plain = form in _HUFFMAN_FRAMES and frame[0] == 8 and frame[5] in (1, 3)
    if not exif and not xmp:
        return ImageHeader("jpeg", width, height, 1, plain)
    # Of two EXIF blocks Pillow takes the first; DALI may crash.
    known = _orientation(exif[0] if exif else b"", xmp) if len(exif) < 2 else None
    if known is None:
        position = stream.tell()
        header = _with_pillow(stream)
        stream.seek(position)
        return header._replace(format="jpeg")
    return _turned(ImageHeader("jpeg", width, height, known[0], plain and known[1]))


def _next_segment(stream: BinaryIO, head: bytes) -> bytes:
    """The marker and length of a segment before which something else stands: fill bytes, markers without a length."""
    while True:
        if len(head) < 2:
            raise HeaderError("the file is truncated: it ends within its header")
        if head[0] != 0xFF or head[1] == 0:
            raise HeaderError(f"the JPEG file is damaged: no marker at byte {stream.tell() - len(head)}")
        if head[1] == _END:
            raise HeaderError("the JPEG file is damaged: it holds no scan")
        if head[1] in _WITHOUT_LENGTH:
            head = head[1 if head[1] == 0xFF else 2 :]
            head += stream.read(4 - len(head))
        elif len(head) < 4:
            raise HeaderError("the file is truncated: it ends within its header")
        else:
            return head


def _png(stream: BinaryIO, start: bytes) -> ImageHeader:
    if len(start) < 29:
        raise HeaderError("the file is truncated: it ends within its header")
    length, kind, width, height, depth = struct.unpack(">I4sIIB", start[8:25])
    # PNG sizes are limited to 31 bits.
    if (length, kind) != (13, b"IHDR") or max(width, height) >= 1 << 31:
        raise HeaderError("the PNG file is damaged: it does not begin with a sound IHDR chunk")
    exif: list[bytes] = []
    xmp, unclear, plain = b"", False, depth <= 8
    stream.seek(33)
    # To the very end: EXIF may follow the pixels.
    for _ in range(_MAX_CHUNKS):
        head = stream.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND":
            break
        if len(head) < 8:
            raise HeaderError("the PNG file is truncated: its last chunk, IEND, is missing")
        content = b""
        if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            content = stream.read(length)
            length -= len(content)
        elif kind == b"acTL":
            # Animated: Pillow and DALI do not agree which picture comes first.
            plain = False
        if kind == b"eXIf":
            exif.append(content)
        elif content.startswith(b"XML:com.adobe.xmp\0"):
            unclear = unclear or kind != b"iTXt" or content[18:19] != b"\0"
            xmp = content
        elif content.startswith(b"Raw profile type exif\0"):
            unclear = True
        stream.seek(length + 4, io.SEEK_CUR)
    else:
        raise HeaderError(f"the PNG file is damaged: more than {_MAX_CHUNKS} chunks")
    if not exif and not xmp and not unclear:
        return ImageHeader("png", width, height, 1, plain)
    known = None if unclear or len(exif) > 1 else _orientation(exif[0] if exif else b"", xmp)
    if known is None:
        return _with_pillow(stream)
    return _turned(ImageHeader("png", width, height, known[0], plain and known[1]))


def _bmp(start: bytes) -> ImageHeader | None:
    """Of 24 bits, uncompressed, as nearly all are; the others are left to Pillow."""
    if start[:2] != b"BM" or len(start) < 34:
        return None
    size, width, height, _, bits, compression = struct.unpack("<IiiHHI", start[14:34])
    plain = size in (40, 108, 124) and bits == 24 and compression == 0
    return ImageHeader("bmp", width, abs(height)) if plain else None


def _webp(start: bytes) -> ImageHeader | None:
    """Without metadata and animation; the others are left to Pillow."""
    if start[:4] != b"RIFF" or start[8:12] != b"WEBP" or len(start) < 30:
        return None
    kind = start[12:16]
    if kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", start[26:30])
        return ImageHeader("webp", width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and start[20] == 0x2F:
        bits = int.from_bytes(start[21:25], "little")
        return ImageHeader("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    # Flags of EXIF, XMP and animation.
    if kind == b"VP8X" and not start[20] & 0b1110:
        width, height = (int.from_bytes(start[at : at + 3], "little") + 1 for at in (24, 27))
        return ImageHeader("webp", width, height)
    return None


def _ppm(start: bytes) -> ImageHeader | None:
    """Binary, three colours of 8 bits, no comments; the others are left to Pillow."""
    found = _PPM.match(start)
    return ImageHeader("ppm", int(found[1]), int(found[2])) if found else None


def _with_pillow(stream: BinaryIO) -> ImageHeader:
    """By Pillow: never plain."""
    stream.seek(0)
    try:
        with Image.open(stream, formats=PILLOW_FORMATS) as image:
            form, (width, height), orientation = str(image.format).lower(), image.size, 1
            # Of a TIFF file Pillow gives the size as shown, and turns it by itself.
            if form != "tiff" and width * height <= MOST_PIXELS:
                orientation = _exif_by_pillow(image)
    except Image.DecompressionBombError as error:
        raise HeaderError(f"the file is refused: {error}") from None
    except Exception as error:  # What Pillow can raise on damaged files is not written anywhere.
        if "cannot identify" in str(error):
            raise HeaderError("the file is no image of a known format") from None
        raise HeaderError(f"the file is damaged: {str(error) or type(error).__name__}") from None
    return _turned(ImageHeader(form, width, height, orientation, False))


def _exif_by_pillow(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        # Its parser fails in many ways on garbage, and then nobody turns the picture.
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _orientation(exif: bytes, xmp: bytes) -> tuple[int, bool] | None:
    """EXIF's orientation and whether DALI sees it; None if readers may differ about such a block (Pillow decides).

    Args:
        exif: a TIFF header and its first directory, as everyone writes it; b"" for none.
        xmp: holds the orientation if EXIF does not; DALI does not look there.
    """
    if exif:
        formats = _TIFF_ORDERS.get(exif[:4])
        if formats is None or len(exif) < 8:
            return None
        number, short, entry, shift = formats
        (begin,) = number.unpack_from(exif, 4)
        if begin < 8 or begin + 2 > len(exif):
            return None
        end = begin + 2 + 12 * short.unpack_from(exif, begin)[0]
        if end > len(exif):
            return None
        found = None
        for tag, kind, count, value in entry.iter_unpack(exif[begin + 2 : end]):
            if tag == _ORIENTATION:
                if found is not None or kind != _SHORT or count != 1:
                    return None
                found = value >> shift & 0xFFFF
            elif found is None and kind < len(_TIFF_SIZES):
                size = count * _TIFF_SIZES[kind]
                # Pillow gives up at the first value that lies outside, and with it what comes behind.
                if size > 4 and value + size > len(exif):
                    return None
        if found is not None:
            return (found, True) if 1 <= found <= 8 else (1, True)
    by_xmp = _XMP_ORIENTATION.search(xmp) if xmp else None
    turn = int(by_xmp[1]) if by_xmp else 1
    return (turn, False) if 2 <= turn <= 8 else (1, True)


def _turned(header: ImageHeader) -> ImageHeader:
    if header.orientation < 5:
        return header
    return header._replace(width=header.height, height=header.width)
