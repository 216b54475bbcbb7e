"""ImageNet's CLS-LOC annotations: one XML file an image, or a table of a whole split, with synsets and boxes.

The parsers read untrusted files: that of XML resolves nothing outside them and refuses any document type, so that no
entity is ever declared or expanded.
"""

import re
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np

from pipelines.errors import DataError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
# Annotations have a few kilobytes; more is no annotation.
_MAX_BYTES = 1 << 20
# The Object Localization Challenge's table of 544,546 training images has 27 MB.
_MAX_TABLE_BYTES = 1 << 28
_HEADER = ("imageid", "predictionstring")
_SYNSET = re.compile(r"[^\s,]{1,100}")


class Annotation(NamedTuple):
    """One image's annotation.

    Attributes:
        names: the synset of each of the M objects.
        boxes: (M, 4) float32 (x_min, y_min, x_max, y_max), the file's own numbers.
        height, width: of the image that was annotated, pixels; 0 if the file does not say.
    """

    names: tuple[str, ...]
    boxes: np.ndarray
    height: int
    width: int


def parse(content: bytes) -> Annotation:
    """Read an annotation; raises ValueError with what is wrong."""
    path: list[str] = []
    text: list[str] = []
    names: list[str] = []
    boxes: list[list[float]] = []
    size = {"height": 0, "width": 0}
    corners: dict[str, float] = {}

    def start(tag: str, _: object) -> None:
        path.append(tag)
        text.clear()

    def end(tag: str) -> None:
        value = "".join(text).strip()
        parents = path[1:-1]
        if parents == ["object"] and tag == "name":
            names.append(value)
        elif parents == ["object", "bndbox"] and tag in _CORNERS:
            corners[tag] = float(value)
        elif parents == ["object"] and tag == "bndbox":
            boxes.append([corners[corner] for corner in _CORNERS])
            corners.clear()
        elif parents == ["size"] and tag in size:
            size[tag] = int(value)
        path.pop()
        text.clear()

    def refuse(*_: object) -> None:
        raise ValueError("it declares a document type, which an annotation does not need")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has {len(content)} bytes")
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise ValueError(f"it is no XML: {error}") from None
    except KeyError as error:
        raise ValueError(f"a box lacks its {error.args[0]}") from None
    if min(size.values()) < 0:
        raise ValueError(f"its image is {size['width']} pixels wide and {size['height']} high")
    table = np.array(boxes, np.float32).reshape(-1, 4)
    if not np.isfinite(table).all():
        raise ValueError("a box has a corner that is not finite")
    return Annotation(tuple(names), table, size["height"], size["width"])


def read(path: Path) -> Annotation:
    """Read an annotation file; raises DataError that names it."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: no CLS-LOC annotation, {error}; restore or remove it") from None


def parse_solution(content: bytes) -> dict[str, Annotation]:
    """Read a table as LOC_val_solution.csv: a row an image, `ImageId,SYNSET X_MIN Y_MIN X_MAX Y_MAX ...`.

    The table does not say how large the images were; the boxes are in pixels of the images as they are.

    Returns:
        The annotation of each image, by its id: the file's name without its ending.

    Raises:
        ValueError: with the line and what is wrong in it.
    """
    if len(content) > _MAX_TABLE_BYTES:
        raise ValueError(f"it has {len(content)} bytes")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text: {error}") from None
    if tuple(word.strip().lower() for word in (lines[0] if lines else "").split(",")) != _HEADER:
        raise ValueError("its first line is not ImageId,PredictionString")
    found: dict[str, Annotation] = {}
    for number, line in enumerate(lines[1:], 2):
        name, _, objects = line.partition(",")
        name, words = name.strip(), objects.split()
        if not name and not words:
            continue
        if not name or not words or len(words) % 5:
            raise ValueError(f"line {number}: wants ImageId,SYNSET X_MIN Y_MIN X_MAX Y_MAX, again for each object")
        if name in found:
            raise ValueError(f"line {number}: {name} stands in it twice")
        synsets = tuple(words[::5])
        try:
            table = np.array([words[corner::5] for corner in range(1, 5)], np.float32).T
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if not np.isfinite(table).all() or not all(_SYNSET.fullmatch(synset) for synset in synsets):
            raise ValueError(f"line {number}: a corner that is not finite, or a synset that is none")
        found[name] = Annotation(synsets, np.ascontiguousarray(table), 0, 0)
    return found


def read_solution(path: Path) -> dict[str, Annotation]:
    """Read a table as LOC_val_solution.csv; raises DataError that names it."""
    try:
        return parse_solution(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: no table of CLS-LOC boxes, {error}; restore or remove it") from None


def fit(annotation: Annotation, height: int, width: int, orientation: int = 1) -> np.ndarray:
    """(M, 4) float32 boxes on an image shown at this size: scaled if it was resized since, clipped; empty ones go.

    ImageNet was annotated in browsers that did not look at EXIF, so the boxes lie on the image as it is stored, and are
    turned as it is. If the annotation's own size says that it was shown upright to the annotator, they stay.

    The file's maxima are taken as the half-open ends. With a size of 0 (unreadable image) the boxes stay as they are.

    Args:
        height, width: of the image as shown, pixels.
        orientation: EXIF's 1 to 8; how the stored image is turned to be shown.
    """
    boxes = annotation.boxes
    if not height or not width:
        return boxes
    noted = annotation.height, annotation.width
    sideways = orientation >= 5
    # Both tall, or both wide.
    upright = sideways and (noted[0] - noted[1]) * (height - width) > 0
    stored = (width, height) if sideways and not upright else (height, width)
    if all(noted) and noted != stored:
        across, down = stored[1] / noted[1], stored[0] / noted[0]
        boxes = boxes * np.array([across, down, across, down], np.float32)
    if not upright:
        boxes = _turn(boxes, *stored, orientation)
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


def _turn(boxes: np.ndarray, height: int, width: int, orientation: int) -> np.ndarray:
    """Boxes (M, 4) of an image stored with this size, where they lie when it is shown (EXIF 2.32, tag 274)."""
    left, top, right, bottom = boxes.T
    # Which of the stored sides the shown rows and columns begin with.
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    if orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
    return np.stack([left, top, right, bottom], axis=1)
