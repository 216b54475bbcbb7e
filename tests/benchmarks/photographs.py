"""Drawn JPEGs with the size and the weight of ImageNet's: 500 x 375 pixels, about 100 KB."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375


def encode(number: int) -> bytes:
    """The bytes of picture `number`: soft colours under fine texture, which is what takes up the space."""
    generator = np.random.default_rng(number)
    soft = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
    texture = generator.normal(0, 14, (HEIGHT, WIDTH, 1))
    file = io.BytesIO()
    Image.fromarray((np.asarray(soft) + texture).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write(folder: Path, count: int) -> list[Path]:
    """Files 0000.jpg, ..., in `folder`."""
    folder.mkdir(parents=True)
    paths = [folder / f"{number:04d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(encode(number % 50))
    return paths
