"""Compositions as a data set in COCO's layout, with exact boxes and masks: for detection and segmentation at home.

    ROOT/train2017/000000000001.jpg      ROOT/annotations/instances_train2017.json      and the same of val

The same options give the same files. Category ids have a gap, as COCO's have; some pictures have no objects. A mask is
the part of an object that is seen, as run lengths; its box lies tightly around it.
"""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines import cache, masks, progress, run_lengths
from pipelines.amounts import check_whole
from pipelines.drawing import composition, objects
from pipelines.drawing.files import JPEG_QUALITY
from pipelines.errors import DataError

# A change of the drawing makes other scenes.
VERSION = 1
MAX_SIZE = 2048
_GAP = 3
_BATCH = 32
_RECORD = "demo-coco.json"
_SPLITS = ("train", "val")


@dataclass(frozen=True)
class Scenes:
    """What to draw.

    Attributes:
        train_count, val_count: pictures of each split; a larger number continues a smaller one.
        size: longer side, pixels.
        classes: the first so many of the demo's objects.
        most: objects in a picture at most.
        seed: another seed gives other pictures.
    """

    train_count: int = 400
    val_count: int = 100
    size: int = 160
    classes: int = 6
    most: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("train_count", 1, 10**7),
            ("val_count", 1, 10**7),
            ("size", composition.MIN_SIZE, MAX_SIZE),
            ("classes", 2, len(objects.OBJECTS)),
            ("most", 1, composition.MOST_OBJECTS),
            ("seed", 0, 2**63 - 1),
        ):
            check_whole(f"demo scenes, option {name}", getattr(self, name), low, high)

    def count(self, split: str) -> int:
        """Pictures of a split."""
        return self.train_count if split == "train" else self.val_count


def export(root: Path, scenes: Scenes) -> None:
    """Draw the scenes into `root`; nothing if they are there already.

    Raises:
        DataError: `root` holds something else in their place, or cannot be written.
    """
    record = {"version": VERSION, **asdict(scenes)}
    try:
        if _recorded(root) == record and all(_is_complete(root, split, scenes) for split in _SPLITS):
            return
        if _recorded(root) is None and any((root / name).exists() for name in _places()):
            raise DataError(f"{root}: holds images or annotations that are no demo scenes; choose an empty folder")
        for name in _places():
            # Others of them, or some that were not finished.
            shutil.rmtree(root / name, ignore_errors=True)
        # Before there is anything else: what was not finished is to be known for what it is.
        root.mkdir(parents=True, exist_ok=True)
        _write(root / _RECORD, json.dumps(record, indent=1).encode(), durable=True)
        for name in _places():
            (root / name).mkdir(exist_ok=True)
        for split in _SPLITS:
            with progress.bar(scenes.count(split), f"drawing {split} scenes", "images") as done:
                _draw(root, split, scenes, done)
    except OSError as error:
        raise DataError(f"{root}: cannot draw the scenes here ({error.strerror}); make room or allow it") from None


def category_id(label: int) -> int:
    """What the annotations call a class."""
    return label + 1 + (label >= _GAP)


def _draw(root: Path, split: str, scenes: Scenes, done: Callable[[int], None]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    count = scenes.count(split)
    for start in range(0, count, _BATCH):
        ids = np.arange(start, min(start + _BATCH, count))
        for sample, numbers in zip(ids.tolist(), composition.numbers(scenes.seed, split, ids), strict=True):
            drawn = composition.draw(scenes.classes, scenes.most, scenes.size, numbers)
            name = f"{sample + 1:012d}.jpg"
            stream = io.BytesIO()
            Image.fromarray(drawn.pixels).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
            _write(root / f"{split}2017" / name, stream.getvalue(), durable=False)
            height, width = drawn.pixels.shape[:2]
            images.append({"id": sample + 1, "file_name": name, "height": height, "width": width})
            annotations += _annotations(drawn, sample + 1, len(annotations) + 1)
        done(len(ids))
    names = list(objects.OBJECTS)[: scenes.classes]
    content = {
        "info": {"description": "drawn objects, lorot data demo-coco", "version": str(VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id(label), "name": name} for label, name in enumerate(names)],
    }
    # Last, so that a split with annotations is whole.
    _write(root / _annotated(split), json.dumps(content, separators=(",", ":")).encode(), durable=False)


def _annotations(drawn: composition.Composition, image: int, first: int) -> list[dict[str, Any]]:
    """The objects of one picture, in COCO's format; `first` is the first one's id."""
    size = list(drawn.masks.shape[1:])
    boxes, _ = masks.enclosing_boxes(drawn.masks)
    runs = run_lengths.encode(drawn.masks)
    return [
        {
            "id": first + number,
            "image_id": image,
            "category_id": category_id(label),
            "bbox": [int(left), int(top), int(right - left), int(bottom - top)],
            "area": int(drawn.masks[number].sum()),
            "iscrowd": 0,
            "segmentation": {"size": size, "counts": runs[number].decode()},
        }
        for number, (label, (left, top, right, bottom)) in enumerate(
            zip(drawn.labels.tolist(), boxes.tolist(), strict=True)
        )
    ]


def _places() -> tuple[str, ...]:
    return (*(f"{split}2017" for split in _SPLITS), "annotations")


def _annotated(split: str) -> str:
    return f"annotations/instances_{split}2017.json"


def _recorded(root: Path) -> object:
    """What the scenes there were drawn with; None if there are none."""
    try:
        return json.loads((root / _RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _is_complete(root: Path, split: str, scenes: Scenes) -> bool:
    if not (root / f"{split}2017").is_dir():
        return False
    there = {entry.name for entry in (root / f"{split}2017").iterdir() if entry.stat().st_size}
    wanted = {f"{sample + 1:012d}.jpg" for sample in range(scenes.count(split))}
    annotated = root / _annotated(split)
    # Empty, as a power cut may leave it, it is to be written again like a picture.
    return annotated.is_file() and annotated.stat().st_size > 0 and wanted <= there


def _write(path: Path, content: bytes, *, durable: bool) -> None:
    with cache.replacing(path, durable=durable) as partial:
        partial.write_bytes(content)
