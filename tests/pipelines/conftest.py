"""Small data sets on disk: drawn pictures as JPEG files, and rows of pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipelines import manifest
from pipelines.manifest import Heading, Manifest, Rows

HEADING = {"name": "drawn", "split": "train", "digest": "0", "fingerprint": "0"}


def draw(number: int, height: int, width: int) -> Image.Image:
    """A picture with soft colours, sharp edges and fine texture, so that every decoding difference shows."""
    generator = np.random.default_rng(number)
    soft = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    picture = ImageDraw.Draw(soft)
    for _ in range(6):
        x, y = generator.integers(0, width), generator.integers(0, height)
        colour = tuple(int(part) for part in generator.integers(0, 256, 3))
        picture.ellipse([x, y, x + width // 3, y + height // 4], fill=colour)
        picture.line([x, y, *(int(part) for part in generator.integers(0, min(width, height), 2))], fill=colour[::-1])
    noise = generator.integers(-10, 11, (height, width, 3))
    return Image.fromarray((np.asarray(soft).astype(int) + noise).clip(0, 255).astype(np.uint8))


def write_files(folder: Path, pictures: list[Image.Image], num_classes: int = 10) -> Manifest:
    """The pictures as JPEG files (colours at half resolution, as cameras store them) and a manifest over them."""
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:04d}.jpg", quality=90)
    return index_files(folder, [(picture.height, picture.width) for picture in pictures], num_classes)


def index_files(folder: Path, sizes: list[tuple[int, int]], num_classes: int = 10) -> Manifest:
    """A manifest over the files 0000.jpg, 0001.jpg, ... of a folder."""
    heights, widths = np.array(sizes, np.int64).T
    rows = Rows(
        labels=np.arange(len(sizes)) % num_classes,
        heights=heights,
        widths=widths,
        paths=[f"{number:04d}.jpg" for number in range(len(sizes))],
    )
    classes = tuple(f"class {number}" for number in range(num_classes))
    manifest.write(folder / "index.arrow", Heading(classes=classes, class_ids=classes, **HEADING), rows)
    return Manifest.open(folder / "index.arrow", folder)


def write_pixels(folder: Path, pixels: np.ndarray, num_classes: int = 10) -> Manifest:
    """A manifest over (N, H, W, 3) uint8 pixels."""
    np.save(folder / "pixels.npy", pixels)
    count, height, width = pixels.shape[:3]
    rows = Rows(np.arange(count) % num_classes, np.full(count, height), np.full(count, width))
    classes = tuple(f"class {number}" for number in range(num_classes))
    heading = Heading(classes=classes, class_ids=classes, array="pixels.npy", **HEADING)
    manifest.write(folder / "index.arrow", heading, rows)
    return Manifest.open(folder / "index.arrow", folder)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """200 JPEG files of many sizes."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(48, 200, (200, 2))
    pictures = [draw(number, int(height), int(width)) for number, (height, width) in enumerate(sizes)]
    return write_files(tmp_path_factory.mktemp("files"), pictures)


@pytest.fixture(scope="session")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """50 images of 32 x 32 pixels in one array, as CIFAR's."""
    images = np.stack([np.asarray(draw(number, 32, 32)) for number in range(50)])
    return write_pixels(tmp_path_factory.mktemp("pixels"), images)
