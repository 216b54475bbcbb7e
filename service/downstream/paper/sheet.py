"""Rows and columns of pictures with titles and captions, in one PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from service.downstream.overlays import overlay

_TILE, _GAP, _TITLE, _CAPTION = 168, 10, 22, 36
_PAPER, _INK, _SOFT = (255, 255, 255), (34, 34, 34), (110, 110, 110)


@dataclass(frozen=True)
class Tile:
    """One picture.

    Attributes:
        photo: (S, S, 3) uint8.
        heat: (S, S) 0..1 to lay over it, or None.
        frames: boxes (x_min, y_min, x_max, y_max) in pixels of the photo, each with its colour; may reach outside.
        caption: two short lines at most.
    """

    photo: np.ndarray
    heat: np.ndarray | None
    frames: tuple[tuple[np.ndarray, tuple[int, int, int]], ...]
    caption: str


def write(rows: Sequence[Sequence[Tile]], columns: Sequence[str], title: str, path: Path) -> None:
    """The sheet; `columns` are titles over the columns, or none."""
    wide = max(len(row) for row in rows)
    top = _GAP + _TITLE + (_TITLE if columns else 0)
    size = (wide * (_TILE + _GAP) + _GAP, top + len(rows) * (_TILE + _CAPTION + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(14), ImageFont.load_default(12)
    draw.text((_GAP, _GAP), cut(title, large, size[0] - 2 * _GAP), fill=_INK, font=large)
    for index, name in enumerate(columns):
        draw.text((_GAP + index * (_TILE + _GAP), _GAP + _TITLE), cut(name, small, _TILE), fill=_SOFT, font=small)
    for number, row in enumerate(rows):
        for index, tile in enumerate(row):
            place = _GAP + index * (_TILE + _GAP), top + number * (_TILE + _CAPTION + _GAP)
            sheet.paste(_picture(tile), place)
            lines = "\n".join(cut(line, small, _TILE) for line in tile.caption.split("\n")[:2])
            draw.multiline_text((place[0], place[1] + _TILE + 3), lines, fill=_INK, font=small, spacing=2)
    sheet.save(path, optimize=True)


def cut(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, most: int) -> str:
    """As much of a line as fits into `most` pixels."""
    if font.getlength(line) <= most:
        return line
    shorter = (f"{line[:end]}…" for end in range(len(line), 0, -1))
    return next((one for one in shorter if font.getlength(one) <= most), "")


def _picture(tile: Tile) -> Image.Image:
    pixels = tile.photo if tile.heat is None else overlay(tile.photo, tile.heat)
    image = Image.fromarray(pixels).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    scale = _TILE / len(tile.photo)
    for box, colour in tile.frames:
        x_min, y_min, x_max, y_max = (float(side) * scale for side in box)
        if x_max - x_min >= 3 and y_max - y_min >= 3:
            draw.rectangle((x_min, y_min, x_max - 1, y_max - 1), outline=(0, 0, 0), width=4)
            draw.rectangle((x_min + 1, y_min + 1, x_max - 2, y_max - 2), outline=colour, width=2)
    return image
