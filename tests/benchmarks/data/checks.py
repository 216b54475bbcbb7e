"""Do all loaders do the same work? Finished images are described by numbers that differ if one of them cut a corner.

From the ruler corpus (ramps of red and green) each image's window is read off: its share of the area, its ratio, where
it lies, whether it was mirrored. Their distributions are held against what torchvision draws. From the photographs come
mean and standard deviation of each channel, and how sharp the images are, against torchvision's own on the same files.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy import stats

from tests.benchmarks.data.corpus import HEIGHT, WIDTH
from tests.benchmarks.data.loaders import MEAN, STD

_MEAN, _STD = np.array(MEAN, np.float32), np.array(STD, np.float32)
# One in ten thousand: a few dozen comparisons are made.
_P_VALUE = 1e-4
_MEAN_TOLERANCE = 0.1
_STD_TOLERANCE = 0.05
_DETAIL_TOLERANCE = 0.15
# Of 255. Who encodes JPEG anew may shift a colour: FFCV's writer turns blue 128 into 126.7. Other constants or channels
# shift it by more than ten.
_COLOUR_TOLERANCE = 2


def describe(batches: Iterable[Any]) -> dict[str, Any]:
    """What can be said of finished batches of (N, 3, S, S); lists are as long as there are images."""
    found: dict[str, list[Any]] = {}
    for batch in batches:
        for name, value in _describe(np.asarray(batch)).items():
            found.setdefault(name, []).append(value)
    means, squares = np.mean(found["mean"], axis=0), np.mean(found["square"], axis=0)
    lists = {name: np.concatenate(found[name]).tolist() for name in ("area", "ratio", "x", "y", "mirrored")}
    return lists | {
        "shapes": sorted(set(found["shape"])),
        "dtypes": sorted(set(found["dtype"])),
        "mean": means.tolist(),
        "std": np.sqrt(np.maximum(squares - means**2, 0)).tolist(),
        "detail": float(np.mean(found["detail"])),
        "blue": float(np.mean(found["blue"])),
    }


def _describe(batch: np.ndarray) -> dict[str, Any]:
    images = np.ascontiguousarray(batch, np.float32)
    level = 255 * (images[:, :2] * _STD[:2, None, None] + _MEAN[:2, None, None])
    x, width = _ramp(level[:, 0].mean(axis=1))
    y, height = _ramp(level[:, 1].mean(axis=2))
    return {
        "shape": str(batch.shape),
        "dtype": str(batch.dtype),
        "mean": images.mean(axis=(0, 2, 3), dtype=np.float64),
        "square": (images**2).mean(axis=(0, 2, 3), dtype=np.float64),
        "detail": np.abs(np.diff(images, axis=3)).mean(dtype=np.float64),
        "area": np.abs(width * height),
        "ratio": np.log(np.maximum(np.abs(width) * WIDTH, 1e-3) / np.maximum(np.abs(height) * HEIGHT, 1e-3)),
        "x": x,
        "y": y,
        "mirrored": width < 0,
        "blue": 255 * (images[:, 2].mean(dtype=np.float64) * STD[2] + MEAN[2]),
    }


def _ramp(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre and signed length (N,) of the piece of the ramp in each line (N, S), as shares of the whole ramp."""
    size = lines.shape[1]
    places = np.arange(size) - (size - 1) / 2
    slope = (lines * places).sum(axis=1) / (places**2).sum()
    return (lines.mean(axis=1) - 28) / 200, slope * size / 200


def expected(count: int = 20_000, seed: int = 0) -> dict[str, np.ndarray]:
    """The same quantities as torchvision draws them, for `count` images of the corpus's size."""
    import torch
    from torchvision.transforms import RandomResizedCrop

    image = torch.empty(3, HEIGHT, WIDTH)
    torch.manual_seed(seed)
    drawn = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    y, x, height, width = drawn.T.astype(float)
    return {
        "area": width * height / (WIDTH * HEIGHT),
        "ratio": np.log(width / height),
        "x": (x + width / 2) / WIDTH,
        "y": (y + height / 2) / HEIGHT,
    }


def differences_in_windows(found: Mapping[str, Any], wanted: Mapping[str, np.ndarray]) -> list[str]:
    """What of the ruler's description is not as torchvision draws it."""
    problems = []
    for name, values in wanted.items():
        result = stats.ks_2samp(found[name], values)
        if result.pvalue < _P_VALUE:
            problems.append(f"{name} of the windows (Kolmogorov-Smirnov {result.statistic:.3f})")
    share = float(np.mean(found["mirrored"]))
    if abs(share - 0.5) > 4 * 0.5 / math.sqrt(len(found["mirrored"])):
        problems.append(f"{share:.0%} mirrored")
    if abs(found["blue"] - 128) > _COLOUR_TOLERANCE:
        problems.append(f"normalisation: blue 128 comes out as {found['blue']:.1f}")
    return problems


def differences_in_pixels(found: Mapping[str, Any], reference: Mapping[str, Any], batch: int, size: int) -> list[str]:
    """What of the photographs' description is not as torchvision's."""
    problems = []
    if found["shapes"] != [str((batch, 3, size, size))]:
        problems.append(f"shape {', '.join(found['shapes'])}")
    if found["dtypes"] != ["float32"]:
        problems.append(f"dtype {', '.join(found['dtypes'])}")
    for mine, other in zip(found["mean"], reference["mean"], strict=True):
        if abs(mine - other) > _MEAN_TOLERANCE:
            problems.append(f"mean {mine:.3f} in place of {other:.3f}")
    for mine, other in zip(found["std"], reference["std"], strict=True):
        if abs(mine / other - 1) > _STD_TOLERANCE:
            problems.append(f"standard deviation {mine:.3f} in place of {other:.3f}")
    if abs(found["detail"] / reference["detail"] - 1) > _DETAIL_TOLERANCE:
        problems.append(f"sharpness {found['detail'] / reference['detail']:.2f} of torchvision's")
    return problems
