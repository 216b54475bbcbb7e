"""Small data sets in COCO's format, written for a test."""

import copy
import json
from pathlib import Path
from typing import Any

from tests.pipelines.conftest import draw

CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 2, "name": "boat"}, {"id": 90, "name": "lamp"}]


def annotation(number: int, image: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    """One object; its segmentation is its box unless it is given."""
    x, y, width, height = bbox
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    about = {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0}
    return about | {"area": width * height, "segmentation": [corners]} | more


def content_of(sizes: list[tuple[int, int]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """An instances file over images 10, 20, ... of (height, width) `sizes`."""
    images = [
        {"id": 10 * (number + 1), "file_name": f"{number:04d}.jpg", "height": height, "width": width}
        for number, (height, width) in enumerate(sizes)
    ]
    # As in COCO's own files, the categories come last.
    return {"info": {}, "images": images, "annotations": annotations, "categories": copy.deepcopy(CATEGORIES)}


def write(root: Path, content: dict[str, Any], split: str = "train") -> Path:
    """The images and the file of a split in COCO's layout; returns the file's path."""
    (root / f"{split}2017").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for number, image in enumerate(content["images"]):
        picture = draw(number, image["height"], image["width"])
        picture.save(root / f"{split}2017" / image["file_name"], quality=90)
    return rewrite(root, content, split)


def rewrite(root: Path, content: object, split: str = "train") -> Path:
    """The file alone; text is written as it is."""
    path = root / "annotations" / f"instances_{split}2017.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
