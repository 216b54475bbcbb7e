"""Object masks: as PNG files, and the boxes around them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from pipelines.image_header import MOST_PIXELS, PNG_SIGNATURE

# A stored (uncompressed) block of the deflate format holds at most this many bytes.
_BLOCK = 0xFFFF


def encode(mask: np.ndarray) -> bytes:
    """A (H, W) bool mask as a PNG of one bit a pixel.

    It is stored, not compressed: one bit is small enough, and compressors differ from machine to machine in the bytes
    they find, while these are the same everywhere.
    """
    height, width = mask.shape
    rows = np.zeros((height, 1 + (width + 7) // 8), np.uint8)
    rows[:, 1:] = np.packbits(mask, axis=1)
    content = rows.tobytes()
    blocks = [b"\x78\x01"]
    for start in range(0, len(content), _BLOCK):
        block = content[start : start + _BLOCK]
        last = start + _BLOCK >= len(content)
        blocks.append(struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block)
    blocks.append(struct.pack(">I", zlib.adler32(content)))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"".join(blocks)) + _chunk(b"IEND", b"")


def decode(content: bytes) -> np.ndarray:
    """The (H, W) bool mask in a PNG file: true where it is not black; raises ValueError if it is none."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it declares {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
            return np.asarray(image.convert("L")) > 0
    except Exception as error:  # What Pillow can raise on damaged files is not written anywhere.
        raise ValueError(str(error) or type(error).__name__) from None


def enclosing_boxes(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 4) float32 half-open boxes (x_min, y_min, x_max, y_max) around (N, H, W) masks; (N,) bool: not empty."""
    _, height, width = masks.shape
    columns: np.ndarray = np.any(masks, axis=1)
    rows: np.ndarray = np.any(masks, axis=2)
    corners = [
        columns.argmax(axis=1),
        rows.argmax(axis=1),
        width - columns[:, ::-1].argmax(axis=1),
        height - rows[:, ::-1].argmax(axis=1),
    ]
    return np.stack(corners, axis=1).astype(np.float32), np.any(columns, axis=1)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
