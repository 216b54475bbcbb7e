"""One demo image: an object of some class in random colours, size, place and shape, on a random background."""

import math
from dataclasses import dataclass

import numpy as np

from pipelines import randomness
from pipelines.drawing import background, objects, raster
from pipelines.drawing.objects import Layer
from pipelines.drawing.shapes import ellipse, polygon, rectangle, ring

MIN_SIZE = 16
# The object's longer side, of the picture's.
SHARE = (0.4, 0.78)
POSE = 16
COLOURS = 40
_DISTRACTORS = 6
PER_DISTRACTOR = 8
NUMBERS = objects.VARIATIONS + POSE + COLOURS + _DISTRACTORS * PER_DISTRACTOR + background.NUMBERS


@dataclass(frozen=True)
class Scene:
    """A drawn image.

    Attributes:
        pixels: (size, size, 3) uint8.
        mask: (size, size) bool, true where at least half the pixel is the object.
    """

    pixels: np.ndarray
    mask: np.ndarray


def numbers(seed: int, split: str, ids: np.ndarray) -> np.ndarray:
    """(N, NUMBERS) float64 in [0, 1): all that is random about the samples."""
    return randomness.uniform(seed, 0, ids, f"demo/{split}", NUMBERS)


def draw(name: str, size: int, drawn: np.ndarray) -> Scene:
    """Draw the object `name` on a picture of `size` x `size` pixels from (NUMBERS,) random `drawn`."""
    parts = np.split(drawn, np.cumsum([objects.VARIATIONS, POSE, COLOURS, _DISTRACTORS * PER_DISTRACTOR]))
    vary, pose, tint, others, texture = parts
    ground, tones, halo = palette(tint.tolist())
    picture = background.draw(size, ground, texture)
    for other in others.reshape(_DISTRACTORS, PER_DISTRACTOR)[: 2 + int(pose[8] * (_DISTRACTORS - 1))].tolist():
        distract(picture, size, other, ground)
    edge = max(1, round(size / 96))
    layers = objects.OBJECTS[name](vary.tolist())
    thing = sketch(layers, place(layers, size, pose.tolist(), outline=2 * edge), size, edge)
    paint(picture, thing, tones, halo, light(size, pose.tolist()))
    return Scene(finished(picture), thing.outline.amount >= raster.FULL // 2)


@dataclass(frozen=True)
class Sketch:
    """An object in its place: how much of each pixel its layers cover, from back to front.

    Attributes:
        layers: what is painted. covers: their coverage. edges: the same with a dark edge around, or None without one.
        outline: the whole object's coverage, a halo around it included; of the whole picture.
    """

    layers: list[Layer]
    covers: list[raster.Patch]
    edges: list[raster.Patch | None]
    outline: raster.Patch


def sketch(layers: list[Layer], placed: list[list[np.ndarray]], size: int, edge: int) -> Sketch:
    """An object whose layers have these contours in pixels, edges and halo `edge` pixels wide."""
    covers = [raster.cover(contours, size, size) for contours in placed]
    whole = np.zeros((size, size), np.int32)
    edges = [
        raster.widen(patch, edge, size, size) if layer.edged else None
        for patch, layer in zip(covers, layers, strict=True)
    ]
    for patch, wide in zip(covers, edges, strict=True):
        outer = wide or patch
        np.maximum(outer.of(whole), outer.amount, out=outer.of(whole))
    return Sketch(layers, covers, edges, raster.widen(raster.Patch(0, 0, whole), edge, size, size))


def paint(picture: np.ndarray, thing: Sketch, tones: np.ndarray, halo: np.ndarray, light: np.ndarray) -> None:
    """Lay an object over a (3, size, size) int32 picture, in place.

    Args:
        tones: (5, 3, 1, 1) int32 colours. halo: (3, 1, 1) int32. light: (size, size) int32 brightness around 256.
    """
    raster.paint(picture, thing.outline, halo)
    for patch, wide, layer in zip(thing.covers, thing.edges, thing.layers, strict=True):
        if wide is not None:
            raster.paint(picture, wide, tones[objects.DARK])
        shaded = (tones[layer.tone] * patch.of(light)) >> 8
        raster.paint(picture, patch, np.minimum(shaded, 255))


def finished(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 pixels of a (3, H, W) int32 picture."""
    return np.ascontiguousarray(picture.astype(np.uint8).transpose(1, 2, 0))


def place(
    layers: list[Layer], size: int, pose: list[float], outline: int, share: tuple[float, float] = SHARE
) -> list[list[np.ndarray]]:
    """The layers' contours in pixels: mirrored, stretched, sheared, tilted, scaled to a `share`, put somewhere."""
    angle = math.radians(24 * pose[0] - 12)
    cos, sin = round(math.cos(angle), 6), round(math.sin(angle), 6)
    across = (0.85 + 0.3 * pose[1]) * (-1 if pose[2] < 0.5 else 1)
    shear = 0.3 * pose[3] - 0.15

    counts = [len(contour) for layer in layers for contour in layer.contours]
    points = np.concatenate([contour for layer in layers for contour in layer.contours])
    x, y = points[:, 0] * across + points[:, 1] * shear, points[:, 1]
    points = np.stack([x * cos - y * sin, x * sin + y * cos], axis=1)
    low = points.min(axis=0)
    extent = points.max(axis=0) - low
    side = (share[0] + (share[1] - share[0]) * pose[4]) * size - 2 * outline
    scale = max(side, 0.625 * share[0] * size) / float(extent.max())
    # One pixel more than the outline: corners may fall anywhere within theirs.
    margin = outline + 1
    room = size - 2 * margin - extent * scale
    points = (points - low) * scale + margin + room * (pose[5], pose[6])
    contours = iter(np.split(points, np.cumsum(counts)[:-1]))
    return [[next(contours) for _ in layer.contours] for layer in layers]


def palette(tint: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Background colours (2, 3) float64, the five tones (5, 3, 1, 1) and the halo (3, 1, 1) int32.

    The object's main tone always differs from the background in luminance, either way; everything else is free.
    """
    dark = tint[0] < 0.5
    level = 0.14 + 0.22 * tint[1] if dark else 0.66 + 0.22 * tint[1]
    main = 0.58 + 0.28 * tint[2] if dark else 0.24 + 0.22 * tint[2]
    second = main + 0.22 if main < 0.5 else main - 0.22
    if tint[3] < 0.5:
        second = min(main + 0.22, 0.94) if main >= 0.5 else max(main - 0.16, 0.08)
    accent = 0.3 + 0.5 * tint[4]
    ground = [_colour(level - 0.09, tint[8:10]), _colour(level + 0.09, tint[10:12])]
    levels = (main, second, accent, 0.07 + 0.08 * tint[5], 0.88 + 0.09 * tint[6])
    tones = [_colour(luminance, tint[12 + 2 * i : 14 + 2 * i]) for i, luminance in enumerate(levels)]
    halo = _colour(0.93 if dark else 0.06, tint[24:26])
    return np.array(ground), _planes(tones), _planes(halo)


def _colour(luminance: float, drawn: list[float]) -> list[float]:
    """RGB, 0 to 255, of this luminance (0 to 1) and of random hue and saturation."""
    hue, saturation = 6 * drawn[0], 0.35 + 0.6 * drawn[1]
    pure = [min(max(abs(hue - 3) - 1, 0), 1), min(max(2 - abs(hue - 2), 0), 1), min(max(2 - abs(hue - 4), 0), 1)]
    mixed = [0.5 + (value - 0.5) * saturation for value in pure]
    bright = _luminance(mixed)
    if luminance <= bright:
        return [255 * value * luminance / bright for value in mixed]
    share = (luminance - bright) / (1 - bright)
    return [255 * (value + (1 - value) * share) for value in mixed]


def _planes(colours: list[float] | list[list[float]]) -> np.ndarray:
    """(..., 3, 1, 1) int32: one number for a whole plane of the picture."""
    return np.array(colours).astype(np.int32)[..., None, None]


def _luminance(colour: list[float]) -> float:
    # One addition after the other: Python's own sum rounds differently from 3.12 on.
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def light(size: int, pose: list[float]) -> np.ndarray:
    """(size, size) int32 brightness around 256, falling across the picture in a random direction."""
    grid = (np.arange(size) + 0.5) / size - 0.5
    slope = grid[None, :] * (120 * pose[9] - 60) + grid[:, None] * (120 * pose[10] - 60)
    return np.floor(slope + 256.5).astype(np.int32)


def distract(picture: np.ndarray, size: int, drawn: list[float], ground: np.ndarray) -> None:
    """Paint a small plain shape, with a colour not far from the background's."""
    radius = 0.025 + 0.04 * drawn[0]
    x, y = drawn[1], drawn[2]
    kind = int(5 * drawn[3])
    if kind == 0:
        contours = [ellipse(x, y, radius, radius)]
    elif kind == 1:
        contours = ring(x, y, radius, radius, radius * 0.45)
    elif kind == 2:
        contours = [rectangle(x - radius, y - radius, x + radius, y + radius)]
    elif kind == 3:
        contours = [polygon((x - radius, y + radius), (x + radius, y + radius * drawn[6]), (x, y - radius))]
    else:
        bar = radius * 0.35
        contours = [
            rectangle(x - radius, y - bar, x + radius, y + bar),
            rectangle(x - bar, y - radius, x + bar, y + radius),
        ]
    level = _luminance(ground[0].tolist()) / 255
    colour = _colour(min(max(level + 0.5 * drawn[4] - 0.25, 0.05), 0.95), [drawn[5], drawn[7]])
    patch = raster.cover([contour * size for contour in contours], size, size)
    raster.paint(picture, patch, _planes(colour))
