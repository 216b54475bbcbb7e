"""Fashion-MNIST: 70,000 photographs of clothes, 28 x 28 grey pixels in ten classes, with boxes and masks.

The four `*-ubyte` files, gzipped or not, where torchvision puts them (`ROOT/FashionMNIST/raw`), in the root itself, or
where Debian's package `dataset-fashion-mnist` does; from https://github.com/zalandoresearch/fashion-mnist (Xiao, Rasul,
Vollgraf 2017, MIT licence). Grey becomes three equal channels. The background is black: the mask of an object is where
the photograph is above 10 (of 255), its box the smallest around the mask.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np

from pipelines import array_store, listing, manifest, masks
from pipelines.errors import DataError
from pipelines.listing import File
from pipelines.manifest import Heading, Manifest, Rows

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MASK_THRESHOLD = 10
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_PREFIXES = {"train": "train", "val": "t10k", "test": "t10k"}


def load(root: Path, split: str) -> Manifest:
    """The manifest of "train" (60,000) or "test" (10,000; "val" is the same); raises DataError as `datasets.load`."""
    if split not in _PREFIXES:
        raise DataError(f"data set 'fashion_mnist' has no split {split!r}; it has {', '.join(_PREFIXES)}")
    names = [f"{_PREFIXES[split]}-images-idx3-ubyte", f"{_PREFIXES[split]}-labels-idx1-ubyte"]
    folder, files = _find(root, names)
    fingerprint = listing.fingerprint(files)

    def build(kept: Path) -> tuple[Heading, Rows]:
        images, labels = (_read(folder / file.path) for file in files)
        return _build(images, labels, folder, split, fingerprint, kept)

    return manifest.cached(root, "fashion_mnist", split, "", fingerprint, build)


def _find(root: Path, names: list[str]) -> tuple[Path, list[File]]:
    places = (root / "FashionMNIST" / "raw", root, DEBIAN)
    for folder in places:
        found = [listing.file(folder, name) or listing.file(folder, f"{name}.gz") for name in names]
        files = [file for file in found if file is not None]
        if len(files) == len(names):
            return folder, files
    raise DataError(
        f"no {names[0]}[.gz] with {names[1]}[.gz] in {', '.join(str(place) for place in places)}; fetch them with: "
        "apt-get install dataset-fashion-mnist, or "
        f"python -c \"import torchvision; torchvision.datasets.FashionMNIST('{root}', download=True)\""
    )


def _build(
    images: np.ndarray, labels: np.ndarray, folder: Path, split: str, fingerprint: str, kept: Path
) -> tuple[Heading, Rows]:
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        raise DataError(f"{folder}: images {images.shape} and labels {labels.shape} do not belong together")
    if labels.max() >= len(CLASSES):
        raise DataError(f"{folder}: a label is {labels.max()}, and Fashion-MNIST has {len(CLASSES)} classes")
    array = array_store.store(kept, f"fashion_mnist-{split}", fingerprint, images)
    boxes, has_box = masks.enclosing_boxes(images > MASK_THRESHOLD)
    rows = Rows(
        labels=labels.astype(np.int64),
        heights=np.full(len(labels), images.shape[1], np.int64),
        widths=np.full(len(labels), images.shape[2], np.int64),
        box_counts=has_box.astype(np.int64),
        boxes=boxes[has_box],
    )
    digest = listing.digest([*CLASSES, rows.labels, images])
    heading = Heading("fashion_mnist", split, CLASSES, CLASSES, digest, fingerprint, array, MASK_THRESHOLD)
    return heading, rows


def _read(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: two zeros, type 8, number of dimensions, big-endian sizes, content."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch it again") from None
    rank = content[3] if len(content) > 3 else 0
    sizes = np.frombuffer(content[4 : 4 + 4 * rank], ">u4").astype(np.int64)
    start = 4 + 4 * rank
    if content[:3] != b"\0\0\x08" or len(sizes) != rank or len(content) - start != int(np.prod(sizes)):
        raise DataError(f"{path}: {len(content)} bytes that are no whole IDX file of bytes; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
