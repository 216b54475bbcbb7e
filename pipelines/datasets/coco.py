"""COCO 2017, and every data set in its format: images in a folder, their objects in one JSON file.

    ROOT/train2017/000000000009.jpg
    ROOT/annotations/instances_train2017.json       boxes, classes, crowds; segmentations as polygons or run lengths

COCO comes from https://cocodataset.org (its terms of use; images under their Flickr licences). For another layout say
where things are: `annotations=labels/{split}.json images=pictures/{split}`, where `{split}` becomes the split's name.

Classes are counted in the order of their category ids, which may have gaps; `class_ids` keeps the ids. Boxes are
clipped to the image. Those that nothing is left of stay, empty: training leaves them out, but they are objects that
nobody finds, as COCO's own tools count them. The manifest's `heading.remarks` says how many there are of both.
Images that training can learn something from come first (`heading.num_trainable`), the others after them: as in
torchvision's references, these are the images with at least one object whose box has sides longer than a pixel (and,
here, is not wholly outside of the image).
An image's own label is the class of its largest object, and 0 without any; nothing here uses it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines import coco_file, listing, manifest
from pipelines.datasets.folder import ENDINGS
from pipelines.errors import DataError
from pipelines.instance_columns import InstanceRows
from pipelines.listing import File
from pipelines.manifest import Heading, Manifest, Rows

# Goes up when the same files give other rows, so that manifests made before are made anew.
_READING = 2
_YEARS = ("2017", "2014", "")
_SPLIT = "{split}"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Found:
    """What is on disk for one split: the annotations' file, the images' folder, and the files in it."""

    annotations: File
    folder: str
    images: dict[str, File]


def load(root: Path, split: str, *, annotations: str | None = None, images: str | None = None) -> Manifest:
    """The manifest of one split.

    Args:
        root: folder that holds images and annotations.
        split: "train", "val", ..., as in `annotations/instances_SPLIT2017.json` and `SPLIT2017`.
        annotations: instances file, relative to `root`, in place of that one; `{split}` in it becomes `split`, without
            it all splits are the same objects.
        images: folder that its file names are relative to, relative to `root`, in place of that one; `{split}` as well.

    Raises:
        DataError: no such files, a damaged annotation (it says which), or an image that is not of the annotated size.
    """
    annotations, images = _named("annotations", annotations, split), _named("images", images, split)
    found = _find(root, split, annotations, images)
    files = [found.annotations, *found.images.values()]
    fingerprint = listing.fingerprint(files, _READING, found.folder)

    def build(_: Path) -> tuple[Heading, Rows]:
        return _build(root, split, found, fingerprint)

    return manifest.cached(root, "coco", split, f"{annotations} {images}", fingerprint, build)


def _named(option: str, given: object, split: str) -> str | None:
    """A path as it was given, with the split's name in it; raises DataError if it is none."""
    if given is not None and not isinstance(given, str):
        # As YAML reads {split} at the start of a value.
        raise DataError(
            f"data set 'coco', option {option}: {given!r} is no text; write a path below the root, in quotes if it "
            "begins with {: " + f"'data.options.{option}=\"{{split}}\"'"
        )
    return None if given is None else given.replace(_SPLIT, split)


def _find(root: Path, split: str, annotations: str | None, images: str | None) -> _Found:
    wanted = (
        f"wanted: {root}/annotations/instances_{split}2017.json and {root}/{split}2017, or say where they are below "
        f"{root}: "
        "data.options.annotations=labels/{split}.json data.options.images=pictures/{split}, where {split} becomes "
        f"{split!r}"
    )
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {wanted}")
    for option, given in (("annotations", annotations), ("images", images)):
        if given is not None and (given.startswith("/") or ".." in given.split("/")):
            raise DataError(f"data set 'coco', option {option}: {given!r} leaves {root}; write a path below it")
    names = [annotations] if annotations else [f"annotations/instances_{split}{year}.json" for year in _YEARS]
    file = next((found for name in names if (found := listing.file(root, name))), None)
    if file is None:
        there = listing.files(root, "annotations", (".json",)) if (root / "annotations").is_dir() else []
        known = ", ".join(entry.path for entry in there[:20]) or "none"
        raise DataError(f"{root / names[0]}: no such file; annotations there: {known}. {wanted}")
    folders = [images] if images is not None else [f"{split}{year}" for year in _YEARS]
    folder = next((name.strip("/") for name in folders if (root / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{root / folders[0]}: no such folder of images; {wanted}")
    inside = len(folder) + 1 if folder else 0
    return _Found(file, folder, {entry.path[inside:]: entry for entry in listing.files(root, folder, ENDINGS)})


def _build(root: Path, split: str, found: _Found, fingerprint: str) -> tuple[Heading, Rows]:
    noted = coco_file.read(root / found.annotations.path)
    count = len(noted.paths)
    paths = [f"{found.folder}/{path}" if found.folder else path for path in noted.paths]
    headers = listing.read_headers(root, paths)
    _check_sizes(root, paths, noted, headers)
    trainable = np.zeros(count, bool)
    # As torchvision's references tell whether an image has anything but empty boxes.
    trainable[noted.rows[noted.visible & (noted.bboxes[:, 2:] > 1).all(axis=1)]] = True
    # Both keep the order of the ids among their own.
    order = np.argsort(~trainable, kind="stable")
    places = np.empty(count, np.int64)
    places[order] = np.arange(count)
    rows = places[noted.rows]
    objects = np.argsort(rows, kind="stable")
    corners = _clipped(noted)[objects]
    heights, widths = headers.heights[order], headers.widths[order]
    paths = [paths[index] for index in order.tolist()]
    instances = InstanceRows(
        image_ids=noted.image_ids[order],
        labels=noted.labels[objects],
        crowd=noted.crowd[objects],
        areas=noted.areas[objects],
        bboxes=noted.bboxes[objects],
        segmentations=[noted.segmentations[index] for index in objects.tolist()],
    )
    counts = np.bincount(rows, minlength=count).astype(np.int64)
    classes, class_ids = _classes(noted.categories)
    inside = len(found.folder) + 1 if found.folder else 0
    sizes = [found.images[path[inside:]].size if path[inside:] in found.images else 0 for path in paths]
    digest = listing.digest(
        [
            *(*classes, *class_ids),
            *(f"{path[inside:]} {size}" for path, size in zip(paths, sizes, strict=True)),
            *(heights, widths, headers.hashes[order], counts, corners),
            *(instances.image_ids, instances.labels, instances.crowd, instances.areas, instances.bboxes),
            *instances.segmentations,
        ]
    )
    heading = Heading(
        "coco",
        split,
        classes,
        class_ids,
        digest,
        fingerprint,
        num_trainable=int(trainable.sum()),
        remarks=dict(noted.remarks),
    )
    for remark, number in noted.remarks.items():
        _log.warning("%s: %d %s", root / found.annotations.path, number, remark)
    labels = _largest(instances, rows[objects], noted.visible[objects], count)
    return heading, Rows(labels, heights, widths, paths, counts, corners, instances=instances)


def _check_sizes(root: Path, paths: list[str], noted: coco_file.Annotations, headers: listing.Headers) -> None:
    """Raises DataError if no image can be read, or one is not of the size that its objects were drawn on."""
    readable = headers.heights > 0
    if not readable.any():
        raise DataError(
            f"{root / paths[0]}: cannot be read, as none of the {len(paths)} images can; is it their folder?"
        )
    other = readable & ((headers.heights != noted.heights) | (headers.widths != noted.widths))
    if not other.any():
        return
    first = int(np.argmax(other))
    turned = int(headers.orientations[first])
    raise DataError(
        f"{root / paths[first]}: {headers.widths[first]} x {headers.heights[first]} pixels as it is shown"
        + (f" (its EXIF turns it, orientation {turned})" if turned > 1 else "")
        + f", but its objects were drawn on {noted.widths[first]} x {noted.heights[first]}; {int(other.sum())} of "
        f"{len(paths)} images are so; restore the images, or annotate these ones"
    )


def _clipped(noted: coco_file.Annotations) -> np.ndarray:
    """(K, 4) float32 boxes (x_min, y_min, x_max, y_max) inside their images; empty where nothing is visible."""
    sides = np.stack([noted.widths[noted.rows], noted.heights[noted.rows]], axis=1)
    low = np.clip(noted.bboxes[:, :2], 0, sides)
    high = np.clip(noted.bboxes[:, :2] + noted.bboxes[:, 2:], 0, sides)
    high = np.where(noted.visible[:, None], high, low)
    return np.concatenate([low, high], axis=1).astype(np.float32)


def _classes(categories: dict[int, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Readable, distinct names, and the ids."""
    names = list(categories.values())
    readable = (f"{name} ({number})" if names.count(name) > 1 else name for number, name in categories.items())
    return tuple(readable), tuple(map(str, categories))


def _largest(instances: InstanceRows, rows: np.ndarray, visible: np.ndarray, count: int) -> np.ndarray:
    """(N,) int64 class of the largest visible object in each image; 0 without any."""
    labels = np.zeros(count, np.int64)
    by_area = np.argsort(instances.areas, kind="stable")
    by_area = by_area[visible[by_area]]
    # Of several values for one place the last is kept.
    labels[rows[by_area]] = instances.labels[by_area]
    return labels
