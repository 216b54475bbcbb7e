"""Image files of every kind that turns up in data sets, made from one picture of 56 x 40 pixels."""

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from tests.pipelines.conftest import draw

HEIGHT, WIDTH = 40, 56
PICTURE = draw(3, HEIGHT, WIDTH)
PIXELS = np.asarray(PICTURE)
OTHER = PICTURE.rotate(180)
NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
DEEP = PIXELS.astype(np.uint16) * 257 ^ NOISE[:, :, None]
GREY16 = Image.fromarray(DEEP[:, :, 0])
RGBA = Image.fromarray(np.dstack([PIXELS, NOISE]))
# Written by libjpeg-turbo's `jpegtran -arithmetic`, from a gradient; nothing in Python writes this.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5a"
    "YVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQAR"
    "CAAoADgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ALKD6ycA26NGC6nu/P8AHL5Gh8TnHKT2M3ddak1GaQtGv2DeZv0x"
    "n4qU0b3PNJKPoJs8w9BfuJbbIzP1DFKh4Uwg3jmiCtFFZWZObYRwhKTA1X9wmbxOel2MKBU5ahXupacEQV+u/wC4UyzSK1pP5f/Z"
)
SIX = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
THREE = SIX.replace(b"\x06", b"\x03")
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    if "append_images" in options:
        options["append_images"] = [more.copy() for more in options["append_images"]]
    # Saving leaves settings behind in the image.
    image.copy().save(file, form, **options)
    return file.getvalue()


def turned(form: str, orientation: int, **options: object) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encode(PICTURE, form, exif=exif, **options)


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def jpegs() -> Iterator[tuple[str, bytes]]:
    """Name and bytes, as in all that follow."""
    plain = encode(PICTURE, "JPEG", quality=90, subsampling=0)
    end = 4 + struct.unpack_from(">H", plain, 4)[0]
    bare, frame, scan = plain[:2] + plain[end:], plain.index(b"\xff\xc0"), plain.index(b"\xff\xda")

    def with_header(*segments: bytes) -> bytes:
        return plain[:end] + b"".join(segments) + plain[end:]

    def with_exif(tiff: bytes) -> bytes:
        return with_header(segment(0xE1, b"Exif\0\0" + tiff))

    def with_ids(ids: bytes) -> bytes:
        data = bytearray(plain)
        for place, name in enumerate(ids):
            data[frame + 10 + 3 * place] = data[scan + 5 + 2 * place] = name
        return bytes(data[:2] + data[end:])

    yield "4:2:0", encode(PICTURE, "JPEG", quality=90)
    yield "4:4:4", plain
    yield "progressive", encode(PICTURE, "JPEG", progressive=True)
    yield "arithmetic", ARITHMETIC
    yield "grey", encode(PICTURE.convert("L"), "JPEG")
    yield "without JFIF", bare
    for transform in (0, 1):
        adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))
        yield f"Adobe {transform}", bare[:2] + adobe + bare[2:]
        yield f"Adobe {transform} and JFIF", with_header(adobe)
    yield "RGB", encode(PICTURE, "JPEG", keep_rgb=True)
    yield "RGB by its names", with_ids(b"RGB")
    yield "numbered from 0", with_ids(b"\0\1\2")
    cmyk = encode(PICTURE.convert("CMYK"), "JPEG")
    place = cmyk.index(b"Adobe")
    yield "CMYK, inverted", cmyk
    yield "YCCK", cmyk[: place + 11] + b"\2" + cmyk[place + 12 :]
    yield "CMYK, not inverted", cmyk[: place - 4] + cmyk[place + 12 :]
    yield "garbage behind", plain + b"garbage" * 50
    yield "another image behind", plain + encode(OTHER, "JPEG")
    yield "MPO", encode(PICTURE, "MPO", save_all=True, append_images=[OTHER])
    for orientation in range(10):
        yield f"EXIF {orientation}", turned("JPEG", orientation)
    yield "EXIF in big-endian", with_exif(b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
    yield "EXIF in little-endian", with_exif(SIX)
    yield "EXIF, orientation of four bytes", with_exif(SIX.replace(b"\3\0\1", b"\4\0\1"))
    yield "EXIF, orientation of one byte", with_exif(SIX.replace(b"\3\0\1", b"\1\0\1"))
    yield "EXIF, two numbers", with_exif(SIX.replace(b"\1\0\0\0\6\0\0\0", b"\2\0\0\0\6\0\3\0"))
    yield "EXIF, orientation twice", with_exif(SIX[:8] + b"\2\0" + SIX[10:22] + THREE[10:22] + bytes(4))
    yield "EXIF cut short", with_exif(SIX[:8] + b"\5\0" + SIX[10:22])
    for name, count in (("a value", 8), ("a long value", 255)):
        maker = struct.pack("<HHII", 0x010F, 2, count, 0xFFFF)
        yield f"EXIF, {name} outside", with_exif(SIX[:8] + b"\2\0" + maker + SIX[10:22] + bytes(4))
    yield "EXIF far inside", with_exif(b"II*\0\x40\0\0\0" + bytes(0x38) + SIX[8:])
    yield "EXIF beyond its end", with_exif(b"II*\0\xff\xff\0\0")
    yield "EXIF of garbage", with_exif(b"garbage!" * 9)
    yield "EXIF of nothing", with_exif(b"")
    yield "two EXIF blocks", with_header(*(segment(0xE1, b"Exif\0\0" + tiff) for tiff in (SIX, THREE)))
    yield "EXIF behind the frame header", plain[:scan] + segment(0xE1, b"Exif\0\0" + SIX) + plain[scan:]
    yield "EXIF before JFIF", plain[:2] + segment(0xE1, b"Exif\0\0" + SIX) + plain[2:]
    yield "orientation in XMP", with_header(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    rows: list[bytes],
    colour: int = 2,
    depth: int = 8,
    before: bytes = b"",
    behind: bytes = b"",
    interlace: int = 0,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> bytes:
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlace)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", header) + before + chunk(b"IDAT", content) + behind + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def pngs() -> Iterator[tuple[str, bytes]]:
    rows = [row.tobytes() for row in PIXELS]
    yield "RGB", encode(PICTURE, "PNG")
    yield "RGBA", encode(RGBA, "PNG")
    yield "grey", encode(PICTURE.convert("L"), "PNG")
    yield "grey and alpha", encode(RGBA.convert("LA"), "PNG")
    yield "1 bit", encode(PICTURE.convert("1"), "PNG")
    nibbles = PIXELS[:, :, 0] >> 4
    yield "4 bits", png([(row[::2] << 4 | row[1::2]).tobytes() for row in nibbles], 0, 4)
    yield "palette", encode(PICTURE.quantize(50), "PNG")
    yield "palette of 4 bits", encode(PICTURE.quantize(13), "PNG", bits=4)
    yield "palette, one transparent", encode(PICTURE.quantize(50), "PNG", transparency=3)
    yield "palette with alpha", encode(PICTURE.quantize(50), "PNG", transparency=bytes(range(0, 250, 5)))
    yield "RGB, one transparent", encode(PICTURE, "PNG", transparency=tuple(PIXELS[3, 3].tolist()))
    yield "grey, one transparent", encode(PICTURE.convert("L"), "PNG", transparency=100)
    yield "grey of 16 bits", encode(GREY16, "PNG")
    for name, colour, channels in (("RGB", 2, [0, 1, 2]), ("RGBA", 6, [0, 1, 2, 0]), ("grey and alpha", 4, [0, 1])):
        yield f"{name} of 16 bits", png([row[:, channels].astype(">u2").tobytes() for row in DEEP], colour, 16)
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    yield "interlaced", png([row.tobytes() for y, x, down, on in passes for row in PIXELS[y::down, x::on]], interlace=1)
    yield "gamma", png(rows, before=chunk(b"gAMA", struct.pack(">I", 22000)))
    yield "background", png([r.tobytes() for r in np.asarray(RGBA)], 6, before=chunk(b"bKGD", b"\0\xff\0\0\0\0"))
    yield "garbage behind", encode(PICTURE, "PNG") + b"garbage" * 50
    yield "animated", encode(PICTURE, "PNG", save_all=True, append_images=[OTHER])
    yield "animated, with a cover", encode(PICTURE, "PNG", save_all=True, default_image=True, append_images=[OTHER])
    for orientation in (2, 5, 6, 8):
        yield f"EXIF {orientation}", turned("PNG", orientation)
    yield "EXIF behind the pixels", png(rows, behind=chunk(b"eXIf", SIX))
    yield "two EXIF chunks", png(rows, before=chunk(b"eXIf", SIX) + chunk(b"eXIf", THREE))
    yield "EXIF of garbage", png(rows, before=chunk(b"eXIf", b"garbage!" * 9))
    raw = b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(SIX) + 6, (b"Exif\0\0" + SIX).hex().encode())
    yield "EXIF as text", png(rows, before=chunk(b"tEXt", raw))
    yield "orientation in XMP", png(rows, before=chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP))
    packed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)
    yield "orientation in packed XMP", png(rows, before=chunk(b"iTXt", packed))


def bmp(bits: int, content: bytes, height: int = HEIGHT, compression: int = 0, palette: bytes = b"") -> bytes:
    start = 54 + len(palette)
    header = struct.pack(
        "<IiiHHIIiiII", 40, WIDTH, height, 1, bits, compression, len(content), 0, 0, len(palette) // 4, 0
    )
    return b"BM" + struct.pack("<IHHI", start + len(content), 0, 0, start) + header + palette + content


def bmps() -> Iterator[tuple[str, bytes]]:
    yield "24 bits", encode(PICTURE, "BMP")
    yield "grey", encode(PICTURE.convert("L"), "BMP")
    yield "palette", encode(PICTURE.quantize(40), "BMP")
    yield "1 bit", encode(PICTURE.convert("1"), "BMP")
    yield "RGBA", encode(RGBA, "BMP")
    yield "top row first", bmp(24, PIXELS[:, :, ::-1].tobytes(), height=-HEIGHT)
    yield "32 bits, all transparent", bmp(32, np.dstack([PIXELS[::-1, :, ::-1], 0 * NOISE]).tobytes())
    fives = (PIXELS[::-1] >> 3).astype("<u2")
    yield "16 bits", bmp(16, (fives[:, :, 0] << 10 | fives[:, :, 1] << 5 | fives[:, :, 2]).tobytes())
    few = PICTURE.quantize(256)
    colours = np.zeros((256, 4), np.uint8)
    found = np.array(few.getpalette(), np.uint8).reshape(-1, 3)
    colours[: len(found), :3] = found[:, ::-1]
    runs = [b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in np.asarray(few)[::-1]]
    yield "run lengths", bmp(8, b"".join(runs) + b"\0\1", compression=1, palette=colours.tobytes())
    old = struct.pack("<IHHIIHHHH", 26 + PIXELS.size, 0, 0, 26, 12, WIDTH, HEIGHT, 1, 24)
    yield "of OS/2", b"BM" + old + PIXELS[::-1, :, ::-1].tobytes()


def others() -> Iterator[tuple[str, bytes]]:
    yield "GIF", encode(PICTURE, "GIF")
    yield "GIF, grey", encode(PICTURE.convert("L"), "GIF")
    yield "GIF, animated", encode(PICTURE, "GIF", save_all=True, append_images=[OTHER])
    yield "GIF, transparent", encode(PICTURE.quantize(40), "GIF", transparency=3)
    for name, options in (("lossy", {}), ("lossless", {"lossless": True, "exact": True})):
        yield f"WebP, {name}", encode(PICTURE, "WEBP", **options)
        yield f"WebP, {name}, RGBA", encode(RGBA, "WEBP", **options)
        yield f"WebP, {name}, EXIF 6", turned("WEBP", 6, **options)
        yield f"WebP, {name}, XMP 6", encode(PICTURE, "WEBP", xmp=XMP, **options)
    yield "WebP, profile", encode(PICTURE, "WEBP", icc_profile=bytes(200))
    yield "WebP, animated", encode(PICTURE, "WEBP", save_all=True, append_images=[OTHER])
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"TIFF, {compression}", encode(PICTURE, "TIFF", compression=compression)
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "LAB", "F"):
        yield f"TIFF, mode {mode}", encode(PICTURE.convert(mode), "TIFF")
    yield "TIFF, RGBA", encode(RGBA, "TIFF")
    yield "TIFF, 16 bits", encode(GREY16, "TIFF")
    yield "TIFF, fax", encode(PICTURE.convert("1"), "TIFF", compression="group4")
    yield "TIFF, several pages", encode(PICTURE, "TIFF", save_all=True, append_images=[OTHER])
    for orientation in (3, 6):
        yield f"TIFF, orientation {orientation}", encode(PICTURE, "TIFF", tiffinfo={274: orientation})
    for mode in ("1", "L", "RGB"):
        yield f"PPM, mode {mode}", encode(PICTURE.convert(mode), "PPM")
    yield "PPM, 16 bits", encode(GREY16, "PPM")
    head = b"\n%d %d\n" % (WIDTH, HEIGHT)
    yield "PPM, RGB of 16 bits", b"P6" + head + b"65535\n" + DEEP.astype(">u2").tobytes()
    yield "PPM, up to 100", b"P6" + head + b"100\n" + (PIXELS // 3).tobytes()
    yield "PPM, as text", b"P3" + head + b"255\n" + b" ".join(b"%d" % value for value in PIXELS.ravel()) + b"\n"
    yield "PPM, commented", b"P6\n# here" + head + b"255\n" + PIXELS.tobytes()
    yield "JPEG 2000", encode(PICTURE, "JPEG2000")
    yield "JPEG 2000, grey", encode(PICTURE.convert("L"), "JPEG2000")
    yield "AVIF", encode(PICTURE, "AVIF")


def refused() -> Iterator[tuple[str, bytes, str]]:
    """Name, bytes, and what the error says."""
    plain = encode(PICTURE, "JPEG", quality=90)
    frame = plain.index(b"\xff\xc0")
    bomb = png([], size=(60_000, 60_000), before=chunk(b"IDAT", zlib.compress(bytes(10_000_000))))
    yield "empty", b"", "empty"
    yield "text", b"<html>not found</html>", "no image of a known format"
    yield "HEIC", b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(200), "no image of a known format"
    yield "PAM", b"P7\nWIDTH 56\nHEIGHT 40\nDEPTH 3\nMAXVAL 255\nENDHDR\n" + PIXELS.tobytes(), "no image of a known"
    yield "PostScript", encode(PICTURE, "EPS"), "no image of a known format"
    yield "SVG", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "no image of a known format"
    yield "12-bit JPEG", plain[: frame + 4] + b"\x0c" + plain[frame + 5 :], "no image of a known format"
    yield "lossless JPEG", plain[: frame + 1] + b"\xc3" + plain[frame + 2 :], "cannot be decoded"
    yield "JPEG of two colours", plain[: frame + 9] + b"\2" + plain[frame + 10 :], "no image of a known format"
    yield "JPEG bomb", plain[: frame + 5] + b"\xff\xff\xff\xff" + plain[frame + 9 :], "65535 x 65535 pixels, more than"
    yield "PNG bomb", bomb, "60000 x 60000 pixels, more than"
    yield "BMP bomb", bmp(24, b"", height=10**7), "56 x 10000000 pixels, more than"
    yield "BMP bomb with a palette", bmp(8, b"", height=10**7), "refused"
    yield "GIF bomb", b"GIF89a" + struct.pack("<HH", 65000, 65000) + encode(PICTURE, "GIF")[10:], "refused"
    yield "PPM bomb", b"P6\n99999 99999\n255\n", "99999 x 99999 pixels, more than"
    yield "truncated JPEG", plain[:-300], "truncated"
    yield "truncated PNG", encode(PICTURE, "PNG")[:-300], "truncated"
    yield "truncated GIF", encode(PICTURE, "GIF")[:-300], "cannot be decoded"
    yield "truncated WebP", encode(PICTURE, "WEBP")[:-30], "truncated"
    yield "truncated TIFF", encode(PICTURE, "TIFF")[:-300], "cannot be decoded|damaged"
    yield "truncated BMP", encode(PICTURE, "BMP")[:-300], "truncated"
