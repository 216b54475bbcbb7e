"""One picture of several objects that lie over each other, with the part that is seen of each."""

from dataclasses import dataclass

import numpy as np

from pipelines import randomness
from pipelines.drawing import background, objects, raster, scene

MIN_SIZE = 48
MOST_OBJECTS = 8
# Longer sides of small, middling and large objects, of the picture's longer side.
SHARES = ((0.12, 0.2), (0.22, 0.36), (0.38, 0.6))
# An object that would hide more of another, or of which the edge of the picture cuts off more, is not painted.
LEAST_SEEN = 0.4
LEAST_PIXELS = 24
# Pictures without any object, and the shortest short side, of the longer one.
_EMPTY = 0.06
_NARROWEST = 0.66
_SETTINGS = 6
_DISTRACTORS = 6
_CHOICES = 4
_PER_OBJECT = _CHOICES + objects.VARIATIONS + scene.POSE + scene.COLOURS
NUMBERS = _SETTINGS + _DISTRACTORS * scene.PER_DISTRACTOR + MOST_OBJECTS * _PER_OBJECT + background.NUMBERS


@dataclass(frozen=True)
class Composition:
    """A drawn picture.

    Attributes:
        pixels: (H, W, 3) uint8.
        labels: (K,) int64 classes, from back to front.
        masks: (K, H, W) bool, the part of each object that is seen; no two have a pixel in common.
    """

    pixels: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


def numbers(seed: int, split: str, ids: np.ndarray) -> np.ndarray:
    """(N, NUMBERS) float64 in [0, 1): all that is random about the samples."""
    return randomness.uniform(seed, 0, ids, f"scenes/{split}", NUMBERS)


def draw(classes: int, most: int, size: int, drawn: np.ndarray) -> Composition:
    """A picture whose longer side has `size` pixels, with up to `most` objects of the first `classes` classes.

    Args:
        drawn: (NUMBERS,) random numbers.
    """
    lengths = [_SETTINGS, _DISTRACTORS * scene.PER_DISTRACTOR, MOST_OBJECTS * _PER_OBJECT]
    settings, others, things, texture = np.split(drawn, np.cumsum(lengths))
    height, width = _sides(size, settings.tolist())
    window = slice((size - height) // 2, (size + height) // 2), slice((size - width) // 2, (size + width) // 2)
    per_object = things.reshape(MOST_OBJECTS, _PER_OBJECT)
    first = _parts(per_object[0])
    ground, _, _ = scene.palette(first[3].tolist())
    picture = background.draw(size, ground, texture)
    for other in others.reshape(_DISTRACTORS, scene.PER_DISTRACTOR)[: 2 + int(settings[3] * (_DISTRACTORS - 1))]:
        scene.distract(picture, size, other.tolist(), ground)
    wanted = 0 if settings[0] < _EMPTY else 1 + int(settings[4] * most)
    labels: list[int] = []
    masks: list[np.ndarray] = []
    whole: list[int] = []
    edge = max(1, round(size / 160))
    for own in per_object[:wanted]:
        choices, vary, pose, tint = _parts(own)
        # All stand out from one background.
        tint[:2] = first[3][:2]
        label, share = int(choices[0] * classes), SHARES[int(choices[1] * len(SHARES))]
        layers = objects.OBJECTS[list(objects.OBJECTS)[label]](vary.tolist())
        placed = scene.place(layers, size, pose.tolist(), outline=2 * edge, share=share)
        thing = scene.sketch(layers, placed, size, edge)
        covered = thing.outline.amount >= raster.FULL // 2
        seen = covered[window]
        left = [mask & ~seen for mask in masks]
        hidden = any(mask.sum() < LEAST_SEEN * full for mask, full in zip(left, whole, strict=True))
        if hidden or seen.sum() < max(LEAST_PIXELS, LEAST_SEEN * covered.sum()):
            continue
        _, tones, halo = scene.palette(tint.tolist())
        scene.paint(picture, thing, tones, halo, scene.light(size, pose.tolist()))
        labels.append(label)
        masks = [*left, seen]
        whole.append(int(covered.sum()))
    pixels = scene.finished(picture[(slice(None), *window)])
    kept = np.stack(masks) if masks else np.zeros((0, height, width), bool)
    return Composition(pixels, np.array(labels, np.int64), kept)


def _sides(size: int, settings: list[float]) -> tuple[int, int]:
    """Height and width: one is `size`, the other at most as long. Even, as the window lies in the middle."""
    short = max(2, round((_NARROWEST + (1 - _NARROWEST) * settings[1]) * size))
    short -= (size - short) % 2
    return (short, size) if settings[2] < 0.5 else (size, short)


def _parts(own: np.ndarray) -> list[np.ndarray]:
    """An object's choices, variations, pose and colours."""
    lengths = [_CHOICES, objects.VARIATIONS, scene.POSE]
    return [part.copy() for part in np.split(own, np.cumsum(lengths))]
