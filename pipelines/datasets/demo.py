"""Drawn objects on textured backgrounds: a data set that comes out of a seed, with exact boxes and masks.

Twelve classes (ten by default) of upright objects in random colours, size, place and shape. The same options give the
same bytes on every machine, any number and size of them; a larger number continues a smaller one. The images are drawn
when they are first asked for, into a folder of the root that is named after the options, as class folders that the data
set `folder` can read too.
"""

from pathlib import Path

import numpy as np

from pipelines import cache, listing, manifest, masks, progress
from pipelines.amounts import check_whole
from pipelines.drawing import files, objects, scene
from pipelines.drawing.files import Job
from pipelines.errors import DataError
from pipelines.manifest import Heading, Manifest, Rows

# Part of the folder's name: a change of the drawing makes new images, it does not mix with old ones.
VERSION = 1
MAX_SIZE = 4096


def load(
    root: Path,
    split: str,
    *,
    train_count: int = 6000,
    val_count: int = 1000,
    size: int = 96,
    seed: int = 0,
    classes: int = 10,
) -> Manifest:
    """The manifest of "train" or "val"; missing images are drawn first, with a progress bar on a terminal.

    Args:
        root: folder that the images are kept in; created if need be.
        split: "train" or "val"; they share no image.
        train_count, val_count: number of images.
        size: side of the square images, pixels.
        seed: another seed gives other images.
        classes: number of classes; sample i is of class i mod classes.

    Raises:
        DataError: an option is out of range, or the folder cannot be written.
    """
    counts = {"train": train_count, "val": val_count}
    if split not in counts:
        raise DataError(f"data set 'demo' has no split {split!r}; it has {', '.join(counts)}")
    for option, value, low, high in (
        ("classes", classes, 2, len(objects.OBJECTS)),
        (f"{split}_count", counts[split], classes, 10**7 - 1),
        ("size", size, scene.MIN_SIZE, MAX_SIZE),
        ("seed", seed, 0, 2**63 - 1),
    ):
        check_whole(f"data set 'demo', option {option}", value, low, high)
    name = f"v{VERSION}-{size}px-{classes}classes-seed{seed}"
    job = Job(str(root / name), split, counts[split], size, classes, seed)
    found = _complete(root, name, job)
    if found is None:
        with cache.locked(cache.folder(root)):
            # Another process may have drawn them while this one waited.
            found = _complete(root, name, job)
            if found is None:
                with progress.bar(job.count, f"drawing {split} images", "images") as done:
                    files.draw_all(job, done)
                found = _complete(root, name, job)
    if found is None:
        raise DataError(f"{root / name}: images vanish while they are drawn; is something else cleaning up there?")
    drawn = found
    fingerprint = listing.fingerprint(drawn, job.count)

    def build(_: Path) -> tuple[Heading, Rows]:
        return _build(root, name, job, drawn, fingerprint)

    return manifest.cached(root, "demo", split, f"{name} {job.count}", fingerprint, build)


def _complete(root: Path, name: str, job: Job) -> list[listing.File] | None:
    """The images of all samples, in order, then their masks; or None if any is missing or empty."""
    kinds = ((name, ".jpg"), (f"{name}/masks", ".png"))
    if not all((root / folder / job.split).is_dir() for folder, _ in kinds):
        return None
    there = {
        file.path: file for folder, ending in kinds for file in listing.files(root, f"{folder}/{job.split}", (ending,))
    }
    stems = [job.stem(sample) for sample in range(job.count)]
    found = [there.get(f"{folder}/{stem}{ending}") for folder, ending in kinds for stem in stems]
    present = [file for file in found if file is not None and file.size]
    return present if len(present) == len(found) else None


def _build(root: Path, name: str, job: Job, drawn: list[listing.File], fingerprint: str) -> tuple[Heading, Rows]:
    paths = [file.path for file in drawn[: job.count]]
    mask_paths = [file.path for file in drawn[job.count :]]
    headers = listing.read_headers(root, paths)
    boxes = np.concatenate([_box(root / path) for path in mask_paths])
    labels = np.array([job.label(sample) for sample in range(job.count)], np.int64)
    classes = tuple(objects.OBJECTS)[: job.classes]
    inside = len(name) + 1
    digest = listing.digest(
        [
            *classes,
            *(f"{file.path[inside:]} {file.size}" for file in drawn[: job.count]),
            *(labels, headers.heights, headers.widths, headers.hashes, boxes),
        ]
    )
    heading = Heading("demo", job.split, classes, classes, digest, fingerprint)
    counts = np.ones(job.count, np.int64)
    return heading, Rows(labels, headers.heights, headers.widths, paths, counts, boxes, mask_paths)


def _box(path: Path) -> np.ndarray:
    try:
        boxes, found = masks.enclosing_boxes(masks.decode(path.read_bytes())[None])
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable mask ({error}); remove it, and it is drawn again") from None
    if not found.all():
        raise DataError(f"{path}: an empty mask; remove it, and it is drawn again")
    return boxes
