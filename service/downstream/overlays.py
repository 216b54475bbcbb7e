"""Pictures of class activation maps: the photograph, the map over it, true boxes green, the found box red."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

TRUE_COLOUR, FOUND_COLOUR = (46, 204, 113), (255, 77, 77)
_TILE, _GAP, _CAPTION, _COLUMNS = 224, 12, 40, 4
_PAPER, _INK = (255, 255, 255), (34, 34, 34)


@dataclass(frozen=True)
class Picture:
    """One image as the network saw it.

    Attributes:
        photo: (S, S, 3) uint8.
        heat: (S, S) 0..1.
        true_boxes: (M, 4), found_box: (4,), (x_min, y_min, x_max, y_max) in pixels of the photo; may reach outside.
        caption: two short lines at most.
    """

    photo: np.ndarray
    heat: np.ndarray
    true_boxes: np.ndarray
    found_box: np.ndarray
    caption: str


def overlay(photo: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The photo (S, S, 3), greyed where the map (S, S) is cold and coloured where it is hot. uint8."""
    colours = matplotlib.colormaps["inferno"](heat)[..., :3] * 255
    grey = photo.mean(axis=2, keepdims=True)
    strength = 0.75 * heat[..., None]
    mixed = (1 - strength) * (0.5 * photo + 0.5 * grey) + strength * colours
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def write_grid(pictures: Sequence[Picture], path: Path) -> Path:
    """All pictures with their boxes and captions in one PNG."""
    columns = min(_COLUMNS, max(len(pictures), 1))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (_TILE + _GAP) + _GAP, max(rows, 1) * (_TILE + _CAPTION + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for index, picture in enumerate(pictures):
        left = _GAP + index % columns * (_TILE + _GAP)
        top = _GAP + index // columns * (_TILE + _CAPTION + _GAP)
        sheet.paste(_tile(picture), (left, top))
        draw.multiline_text((left, top + _TILE + 3), picture.caption, fill=_INK, font=font, spacing=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return path


def _tile(picture: Picture) -> Image.Image:
    scale = _TILE / picture.photo.shape[0]
    tile = Image.fromarray(overlay(picture.photo, picture.heat)).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(tile)
    for box, colour in [(box, TRUE_COLOUR) for box in picture.true_boxes] + [(picture.found_box, FOUND_COLOUR)]:
        x_min, y_min, x_max, y_max = (float(side) * scale for side in box)
        if x_max - x_min < 1 or y_max - y_min < 1:
            continue
        draw.rectangle((x_min, y_min, x_max - 1, y_max - 1), outline=(0, 0, 0), width=4)
        draw.rectangle((x_min + 1, y_min + 1, x_max - 2, y_max - 2), outline=colour, width=2)
    return tile
