"""What the network was shown, as pictures for people."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_TILE, _GAP, _CAPTION, _COLUMNS, _MOST = 128, 8, 20, 8, 16
_PAPER, _INK, _BOX = (255, 255, 255), (34, 34, 34), (255, 77, 77)


def denormalise(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Network inputs (N, 3, H, W) back as pictures (N, H, W, 3) uint8."""
    pixels = images.transpose(0, 2, 3, 1) * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)


def write_objects(photos: Sequence[np.ndarray], boxes: Sequence[np.ndarray], path: Path) -> Path:
    """A PNG of the first images of a batch with a frame around every object.

    Args:
        photos: (H, W, 3) uint8, each of its own size.
        boxes: of each photo, (K, 4) (x_min, y_min, x_max, y_max) in its pixels.
    """
    count = min(len(photos), _MOST)
    columns = min(_COLUMNS // 2, count)
    rows = -(-count // columns)
    side = 2 * _TILE
    sheet = Image.new("RGB", (columns * (side + _GAP) + _GAP, rows * (side + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (photo, own) in enumerate(zip(photos[:count], boxes, strict=False)):
        left, top = _GAP + index % columns * (side + _GAP), _GAP + index // columns * (side + _GAP)
        scale = side / max(photo.shape[:2])
        size = max(1, round(photo.shape[1] * scale)), max(1, round(photo.shape[0] * scale))
        sheet.paste(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC), (left, top))
        for x_min, y_min, x_max, y_max in (own * scale).tolist():
            right, bottom = max(x_min, x_max - 1), max(y_min, y_max - 1)
            draw.rectangle((left + x_min, top + y_min, left + right, top + bottom), outline=_BOX, width=2)
    sheet.save(path, optimize=True)
    return path


def write_samples(
    pictures: np.ndarray, captions: Sequence[str], boxes: np.ndarray, turns: np.ndarray, path: Path
) -> Path:
    """A PNG of the first images of a batch with a frame around what was turned.

    Args:
        pictures: (N, S, S, 3) uint8.
        captions: a word or two for each; the turn is added in degrees, counter-clockwise.
        boxes: (N, 3) (y, x, side) in pixels of the pictures.
        turns: (N,) quarter turns; a picture that was not turned gets no frame.
    """
    count = min(len(pictures), _MOST)
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    size = (columns * (_TILE + _GAP) + _GAP, rows * (_TILE + _CAPTION + _GAP) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    scale = _TILE / pictures.shape[1]
    for index in range(count):
        left = _GAP + index % columns * (_TILE + _GAP)
        top = _GAP + index // columns * (_TILE + _CAPTION + _GAP)
        tile = Image.fromarray(pictures[index]).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
        sheet.paste(tile, (left, top))
        caption = captions[index]
        if turns[index]:
            y, x, side = (float(value) * scale for value in boxes[index])
            draw.rectangle((left + x, top + y, left + x + side - 1, top + y + side - 1), outline=_BOX, width=2)
            caption += f"  {90 * int(turns[index])}°"
        draw.text((left, top + _TILE + 3), caption, fill=_INK, font=font)
    sheet.save(path, optimize=True)
    return path
