"""Annotations in COCO's format (cocodataset.org, "Data format"), read as what they are: somebody else's file.

An instances file of a large set has hundreds of megabytes. As Python objects it would take ten times as much, so it is
walked element by element, and of each nothing stays but its numbers and its run lengths.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pipelines import progress, run_lengths
from pipelines.errors import DataError
from pipelines.image_header import MOST_PIXELS

MOST_BYTES = 2**31
_LISTS = ("categories", "images", "annotations")
_SPACE = re.compile(r"[ \t\r\n]*")
_MEND = "restore or correct the file"
# Characters between two signs of life.
_STRIDE = 10**6
# Characters of a category's name: with its id behind it, where two are called the same, it must fit a model's card,
# which takes 1000.
_LONGEST_NAME = 960
# Pixels; corners are kept in 32 bits, which tell no thinner boxes apart.
_THINNEST = 1e-3


class FormatError(ValueError):
    """What is wrong with an element."""


@dataclass
class Annotations:
    """What a file says, as columns; objects stand in the order of the file.

    Attributes:
        categories: id -> name, by ascending id; names may be equal.
        image_ids, heights, widths, paths: N images, by ascending id.
        rows: (K,) int64 which image each object is in.
        labels: (K,) int64 which category (counted by ascending id).
        bboxes: (K, 4) float64 (x_min, y_min, width, height) as in the file.
        areas: (K,) float64. crowd: (K,) bool.
        segmentations: K compressed run lengths; b"" without one.
        visible: (K,) bool, something of the box lies in the image; what is not can only be missed.
        remarks: what is of no use to training or was mended, and how often.
    """

    categories: dict[int, str]
    image_ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    paths: list[str]
    rows: np.ndarray
    labels: np.ndarray
    bboxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    segmentations: list[bytes]
    visible: np.ndarray
    remarks: Counter[str]


def read(path: Path) -> Annotations:
    """The annotations in a file.

    Raises:
        DataError: it cannot be read, is larger than MOST_BYTES, or something in it is missing, of the wrong type,
            there twice, or refers to what is not there; the message says where.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise DataError(f"{path}: {size:,} bytes, more than the {MOST_BYTES:,} that are read; split it")
        text = path.read_text("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_MEND}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); {_MEND}") from None
    try:
        return _read(text, path.name)
    except FormatError as error:
        raise DataError(f"{path}: {error}; {_MEND}") from None
    except RecursionError:
        raise DataError(f"{path}: brackets within brackets without end; {_MEND}") from None


def _read(text: str, name: str) -> Annotations:
    walk = _Walk(text)
    found = _Found()
    seen: set[str] = set()
    waiting = None
    with progress.bar(len(text) // _STRIDE, f"reading {name}", "MB") as done:
        for key in walk.members():
            if key in seen:
                raise FormatError(f"{key!r} is there twice")
            seen.add(key)
            if key == "annotations" and "images" not in seen:
                # They say nothing without their images, which then come behind them.
                waiting = walk.position
                walk.elements(key, lambda _: None, lambda _: None)
            elif key in _LISTS:
                walk.elements(key, found.take[key], done)
            else:
                walk.value()
        missing = [key for key in _LISTS if key not in seen]
        if missing:
            raise FormatError(f"it has no {missing[0]!r}; an instances file has {', '.join(_LISTS)}")
        if waiting is not None:
            walk.position = waiting
            walk.elements("annotations", found.take["annotations"], done)
    return found.finished()


class _Walk:
    """A place in the text of a JSON object."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._decode = json.JSONDecoder(parse_constant=_refuse).raw_decode
        self.position = 0

    def members(self) -> Iterator[str]:
        """The keys of the object; after each the place is at its value, which must be read."""
        if self._next() != "{":
            raise FormatError("it is no JSON object, as an instances file is")
        self.position += 1
        while self._next() != "}":
            key = self.value()
            if not isinstance(key, str):
                self._fail("a key")
            self._expect(":")
            yield key
            if self._next() != "}":
                self._expect(",")
        self.position += 1
        if self._next():
            raise FormatError(f"it is no JSON: there is more behind its end, at character {self.position}")

    def value(self) -> Any:
        """The value at this place, and on to behind it."""
        self._next()
        try:
            value, self.position = self._decode(self._text, self.position)
        except ValueError as error:
            raise FormatError(f"it is no JSON: {error}") from None
        return value

    def elements(self, key: str, take: Callable[[Any], None], done: Callable[[int], None]) -> None:
        """Let `take` have each element of the list at this place."""
        if self._next() != "[":
            raise FormatError(f"{key!r} is no list")
        self.position += 1
        if self._next() == "]":
            self.position += 1
            return
        number, told = 0, self.position // _STRIDE
        while True:
            try:
                take(self.value())
            except FormatError as error:
                raise FormatError(f"{key}[{number}]: {error}") from None
            number += 1
            done(self.position // _STRIDE - told)
            told = self.position // _STRIDE
            if self._next() == "]":
                self.position += 1
                return
            self._expect(",")

    def _next(self) -> str:
        found = _SPACE.match(self._text, self.position)
        assert found is not None
        self.position = found.end()
        return self._text[self.position : self.position + 1]

    def _expect(self, sign: str) -> None:
        if self._next() != sign:
            self._fail(repr(sign))
        self.position += 1

    def _fail(self, wanted: str) -> NoReturn:
        raise FormatError(f"it is no JSON: {wanted} is missing at character {self.position}")


@dataclass
class _Found:
    """What has been read so far."""

    categories: dict[int, str] = field(default_factory=dict)
    images: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    paths: set[str] = field(default_factory=set)
    ids: set[int] = field(default_factory=set)
    image_ids: array = field(default_factory=lambda: array("q"))
    category_ids: array = field(default_factory=lambda: array("q"))
    bboxes: array = field(default_factory=lambda: array("d"))
    areas: array = field(default_factory=lambda: array("d"))
    crowd: array = field(default_factory=lambda: array("b"))
    segmentations: list[bytes] = field(default_factory=list)
    visible: array = field(default_factory=lambda: array("b"))
    remarks: Counter[str] = field(default_factory=Counter)

    @property
    def take(self) -> dict[str, Callable[[Any], None]]:
        return {"categories": self.category, "images": self.image, "annotations": self.annotation}

    def category(self, element: Any) -> None:
        number, name = _integer(element, "id"), _text(element, "name")
        if number in self.categories:
            raise FormatError(f"category id {number} is there twice")
        if len(name) > _LONGEST_NAME:
            raise FormatError(f"name {_short(name)} has {len(name)} characters; write at most {_LONGEST_NAME}")
        self.categories[number] = name

    def image(self, element: Any) -> None:
        number, path = _integer(element, "id"), _text(element, "file_name")
        height, width = _integer(element, "height", 1), _integer(element, "width", 1)
        if height * width > MOST_PIXELS:
            raise FormatError(f"an image of {width} x {height} pixels, more than {MOST_PIXELS:,}")
        if path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/"):
            raise FormatError(f"file_name {path!r} leaves the folder of the images")
        if number in self.images or path in self.paths:
            raise FormatError(f"image id {number} or file_name {path!r} is there twice")
        self.images[number] = height, width, path
        self.paths.add(path)

    def annotation(self, element: Any) -> None:
        image, category = _integer(element, "image_id"), _integer(element, "category_id")
        if image not in self.images:
            raise FormatError(f"image_id {image} is none of the {len(self.images)} images")
        if "id" in element:
            number = _integer(element, "id")
            if number in self.ids:
                raise FormatError(f"annotation id {number} is there twice")
            self.ids.add(number)
        bbox = element.get("bbox")
        if not isinstance(bbox, list) or len(bbox) != 4:
            raise FormatError(f"bbox {_short(bbox)} is no list of four numbers (x, y, width, height)")
        x, y, width, height = (_number(value, "bbox") for value in bbox)
        crowd = element.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise FormatError(f"iscrowd {_short(crowd)} is neither 0 nor 1")
        image_height, image_width, _ = self.images[image]
        right, bottom = min(x + width, image_width), min(y + height, image_height)
        visible = right - max(x, 0) >= _THINNEST and bottom - max(y, 0) >= _THINNEST
        if not visible:
            self.remarks["boxes without an area in the image, not trained on"] += 1
        elif x < 0 or y < 0 or x + width > image_width or y + height > image_height:
            self.remarks["boxes that reach over the edge, clipped"] += 1
        area = width * height if element.get("area") is None else _number(element["area"], "area")
        # That of a box with a side below 0 is kept: the score ignores such an object, as COCO's own tools do.
        if area < 0 and visible:
            raise FormatError(f"area {area} is below 0")
        runs = _segmentation(element.get("segmentation"), image_height, image_width)
        self.image_ids.append(image)
        self.category_ids.append(category)
        self.bboxes.extend((x, y, width, height))
        self.areas.append(area)
        self.crowd.append(int(crowd))
        self.segmentations.append(runs)
        self.visible.append(int(visible))
        if not runs:
            self.remarks["boxes without a segmentation"] += 1

    def finished(self) -> Annotations:
        if not self.categories:
            raise FormatError("'categories' is empty")
        if not self.images:
            raise FormatError("'images' is empty")
        ids = sorted(self.images)
        numbers, image_ids = np.array(sorted(self.categories), np.int64), np.array(ids, np.int64)
        # Categories come last in COCO's own files, so that this is seen only here.
        strange = set(self.category_ids) - set(self.categories)
        if strange:
            raise FormatError(f"category_id {min(strange)} is none of the {len(self.categories)} categories")
        sizes = np.array([self.images[number][:2] for number in ids], np.int64)
        return Annotations(
            categories={number: self.categories[number] for number in numbers.tolist()},
            image_ids=image_ids,
            heights=sizes[:, 0].copy(),
            widths=sizes[:, 1].copy(),
            paths=[self.images[number][2] for number in ids],
            rows=np.searchsorted(image_ids, np.array(self.image_ids, np.int64)),
            labels=np.searchsorted(numbers, np.array(self.category_ids, np.int64)),
            bboxes=np.array(self.bboxes, np.float64).reshape(-1, 4),
            areas=np.array(self.areas, np.float64),
            crowd=np.array(self.crowd, bool),
            segmentations=self.segmentations,
            visible=np.array(self.visible, bool),
            remarks=self.remarks,
        )


def _segmentation(given: Any, height: int, width: int) -> bytes:
    """Compressed run lengths; b"" for none."""
    if given is None or given == []:
        return b""
    try:
        if isinstance(given, list):
            if not all(isinstance(polygon, list) for polygon in given):
                raise FormatError("segmentation is a list, but not of polygons")
            for polygon in given:
                # One look at the types: there are millions of coordinates.
                if not set(map(type, polygon)) <= {int, float}:
                    raise FormatError(f"segmentation holds {_short(polygon)}, which are not all numbers")
            return run_lengths.from_polygons(given, height, width)
        if not isinstance(given, dict) or given.get("size") != [height, width]:
            raise FormatError(f"segmentation has no size [{height}, {width}], which is that of its image")
        counts = given.get("counts")
        if isinstance(counts, str):
            return run_lengths.checked(counts.encode(), height, width)
        if isinstance(counts, list):
            return run_lengths.from_counts(counts, height, width)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"segmentation: {error}") from None
    raise FormatError("segmentation has no counts, neither a list nor a text")


def _integer(element: Any, key: str, least: int = -(2**62)) -> int:
    value = _of(element, key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**62:
        raise FormatError(f"{key} {_short(value)} is no whole number" + (" above 0" if least == 1 else ""))
    return value


def _text(element: Any, key: str) -> str:
    value = _of(element, key)
    if not isinstance(value, str) or not value.strip():
        raise FormatError(f"{key} {_short(value)} is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FormatError(f"{key} {_short(value)} holds half a character") from None
    return value


def _of(element: Any, key: str) -> Any:
    if not isinstance(element, dict):
        raise FormatError(f"{_short(element)} is no object")
    if key not in element:
        raise FormatError(f"it has no {key!r}")
    return element[key]


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise FormatError(f"{key} holds {_short(value)}, which is no usable number")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")
