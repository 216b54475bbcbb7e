"""ImageNet's CLS-LOC annotations: one XML file an image, with its synset and the boxes of its objects.

The parser reads untrusted files: it resolves nothing outside them and refuses any document type, so that no entity is
ever declared or expanded.
"""

from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

import numpy as np

from pipelines.errors import DataError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
# Annotations have a few kilobytes; more is no annotation.
_MAX_BYTES = 1 << 20


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


def fit(annotation: Annotation, height: int, width: int) -> np.ndarray:
    """(M, 4) float32 boxes on an image of this size: scaled if the image was resized since, clipped; empty ones go.

    The file's maxima are taken as the half-open ends. With a size of 0 (unreadable image) the boxes stay as they are.
    """
    boxes = annotation.boxes
    if not height or not width:
        return boxes
    if annotation.height and annotation.width and (annotation.height, annotation.width) != (height, width):
        across, down = width / annotation.width, height / annotation.height
        boxes = boxes * np.array([across, down, across, down], np.float32)
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
