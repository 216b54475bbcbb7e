"""Pixels of small images as one `.npy` file in the cache folder: written once, then mapped by every process."""

from pathlib import Path

import numpy as np

from pipelines import cache


def store(kept: Path, name: str, fingerprint: str, pixels: np.ndarray) -> str:
    """Write (N, H, W) or (N, H, W, 3) uint8 `pixels`; the file's name is for `Heading.array`.

    The name holds the fingerprint of the source, so that a manifest never meets another version's pixels. Older
    versions are removed; a process that has one mapped keeps it.
    """
    path = kept / f"{name}-{fingerprint[:16]}.npy"
    with cache.replacing(path) as partial, partial.open("wb") as stream:
        np.save(stream, pixels, allow_pickle=False)
        stream.flush()
    for other in kept.glob(f"{name}-{'[0-9a-f]' * 16}.npy"):
        if other != path:
            other.unlink(missing_ok=True)
    return path.name
