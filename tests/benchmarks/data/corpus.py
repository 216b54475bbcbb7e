"""The images: crops of real photographs, the same on every machine, as class folders of JPEGs and what is made of them.

Three corpora:

- light: about 33 kB a file, what libjpeg decodes fastest at this size;
- photo: about 110 kB a file, ImageNet's average;
- ruler: no photographs but ramps, red from left to right and green from top to bottom, so that a finished image tells
  which window of it was taken and whether it was mirrored. Loaders are held to each other by it, not timed.

The photographs come with scikit-image: astronaut (NASA, public domain), coffee (R. Michel, CC0), chelsea (S. van der
Walt, CC0), rocket (SpaceX, CC0).
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks.data import loaders

WIDTH, HEIGHT = 500, 375
SHORT = 256
_PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
# In a cache's folder name: to be raised when the making of any form changes.
_VERSION = 1


@dataclass(frozen=True)
class Corpus:
    """How a corpus is made: how many images, their JPEG quality, the standard deviation of the noise on them."""

    count: int
    quality: int
    noise: float


CORPORA = {
    "light": Corpus(2000, 85, 1.0),
    "photo": Corpus(2000, 96, 7.0),
    "ruler": Corpus(512, 95, 0.0),
}


def folder(cache: Path, name: str) -> Path:
    """Where a corpus and all forms of it lie."""
    return cache / f"{name}-{_VERSION}"


def form(cache: Path, name: str, module: str, row: loaders.Row) -> Path:
    """The folder of one form of a corpus, made if it is not there, with what it is made from."""
    own = folder(cache, name)
    files = _whole(own / "files", lambda target: _photographs(name, target))
    if row.form == "files":
        return files
    small = own / "files256"
    if "files256" in (row.form, row.source):
        _whole(small, lambda target: _reduce(files, target))
    if row.form == "files256":
        return small
    source = small if row.source == "files256" else files
    return _whole(own / row.form, lambda target: loaders.load(module).write(row.form, source, target))


def num_bytes(path: Path) -> int:
    """Of all files in a folder, without caches in hidden folders."""
    files = (found for found in path.rglob("*") if found.is_file() and not _hidden(found.relative_to(path)))
    return sum(file.stat().st_size for file in files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _whole(path: Path, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, there in full or not at all."""
    if not path.is_dir():
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(path)
    return path


def _photographs(name: str, target: Path) -> None:
    corpus = CORPORA[name]
    sources = {} if name == "ruler" else _sources()
    for index in range(corpus.count):
        label = _PHOTOGRAPHS[index % len(_PHOTOGRAPHS)]
        image = _ramps() if name == "ruler" else _crop(sources[label], np.random.default_rng([7, index]), corpus.noise)
        file = target / "train" / label / f"{index:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, quality=corpus.quality)


def _sources() -> dict[str, Image.Image]:
    try:
        from skimage import data
    except ImportError:
        raise RuntimeError("the photographs come with scikit-image: pip install scikit-image") from None
    return {name: Image.fromarray(getattr(data, name)()) for name in _PHOTOGRAPHS}


def _crop(source: Image.Image, rng: np.random.Generator, noise: float) -> Image.Image:
    """Half to all of the photograph's width (if its height allows), 4 to 3, at the corpus's size, with noise."""
    largest = min(source.width, source.height * WIDTH / HEIGHT)
    width = largest * rng.uniform(0.5, 1.0)
    height = width * HEIGHT / WIDTH
    x, y = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
    image = source.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
    noisy = np.asarray(image, np.float32) + rng.normal(0, noise, (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _ramps() -> Image.Image:
    """Red 28 to 228 from left to right, green from top to bottom, blue 128."""
    across = np.tile(28 + 200 * (np.arange(WIDTH) + 0.5) / WIDTH, (HEIGHT, 1))
    down = np.tile((28 + 200 * (np.arange(HEIGHT) + 0.5) / HEIGHT)[:, None], (1, WIDTH))
    pixels = np.stack([across, down, np.full((HEIGHT, WIDTH), 128.0)], axis=2)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _reduce(files: Path, target: Path) -> None:
    for path in sorted(files.glob("train/*/*.jpg")):
        with Image.open(path) as image:
            scale = SHORT / min(image.size)
            size = round(image.width * scale), round(image.height * scale)
            small = image.resize(size, Image.Resampling.BILINEAR)
        file = target / path.relative_to(files)
        file.parent.mkdir(parents=True, exist_ok=True)
        small.save(file, quality=90)


def main() -> None:
    """Make one form: in a process of its own, in the environment that has the library for it."""
    parser = argparse.ArgumentParser(description="make one form of a corpus")
    parser.add_argument("cache", type=Path)
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("row")
    arguments = parser.parse_args()
    module, row, _ = loaders.available()[arguments.row]
    print(form(arguments.cache, arguments.corpus, module, row))


if __name__ == "__main__":
    main()
