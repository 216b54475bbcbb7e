"""What is to be done with each sample of a batch: arrays in, arrays out, the same for every rendering of it."""

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from pipelines.augment import Augmentation
from pipelines.augment.operations import Operation
from pipelines.errors import LorotError
from pipelines.pretext import PretextTask
from pipelines.randomness import scale_to_integers, uniform

# As in torchvision's RandomResizedCrop, which gives up after as many.
TRIES = 10
P = TypeVar("P")


@dataclass(frozen=True)
class View:
    """How a source image becomes the network's input; the meaning of the keys is that of the configuration's `data`.

    Attributes:
        size: side of the input, pixels.
        crop: "random_resized", "pad" or "whole": how the training window is drawn.
        scale: random_resized: from and to which share of the area.
        ratio: random_resized: from and to which width / height.
        padding: pad: how far the window may reach over each edge, pixels; what lies outside is black.
        flip: mirror half of the training images.
        eval_crop: random_resized: side of the evaluation window, as a share of the short side.
        mean, std: of R, G, B, on a scale of 0 to 1.
        eval_size: side of the input in evaluation, pixels; None: as in training.
        augment: what is done to training images after they are mirrored, in this order.
    """

    size: int
    crop: str = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    flip: bool = True
    eval_crop: float = 0.875
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    eval_size: int | None = None
    augment: tuple[Augmentation, ...] = ()

    def __post_init__(self) -> None:
        if self.crop not in ("random_resized", "pad", "whole"):
            raise LorotError(f"crop {self.crop!r} does not exist; there are random_resized, pad, whole")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise LorotError(f"scale {self.scale}: needs 0 < from <= to <= 1, as in (0.08, 1)")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise LorotError(f"ratio {self.ratio}: needs 0 < from <= to, as in (0.75, 1.333)")
        names = [_name(augmentation) for augmentation in self.augment]
        for place, (name, augmentation) in enumerate(zip(names, self.augment, strict=True)):
            if name in names[:place]:
                raise LorotError(f"augmentation {name!r} stands twice, and would draw the same numbers twice")
            if place + 1 < len(names) and any(Operation.ERASE in slot for slot in augmentation.slots):
                raise LorotError(f"augmentation {name!r} acts after normalisation and must be the last one")

    @property
    def slots(self) -> tuple[frozenset[Operation], ...]:
        """The operations that may stand at each of the K places of a training plan's `ops`."""
        return tuple(slot for augmentation in self.augment for slot in augmentation.slots)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided about N samples before a pixel is read.

    Attributes:
        ids, epochs: (N,) int64.
        windows: (N, 4) int64 (y, x, height, width) in source pixels; may reach outside the image for crop "pad" only.
        flips: (N,) bool, mirror left to right after the window is resized.
        boxes: (N, 3) int64 (y, x, side) in pixels of the input, turned after the flip.
        turns: (N,) int64, counter-clockwise quarter turns.
        pretext_labels: (N,) int64.
        valid: (N,) bool, false for what fills up a last batch.
        size: side of the input, pixels.
        ops: (N, K) int64 codes of `augment.operations.Operation`, done in this order between flip and turn.
        amounts: (N, K, 4) float32, what they mean depends on the operation.
    """

    ids: np.ndarray
    epochs: np.ndarray
    windows: np.ndarray
    flips: np.ndarray
    boxes: np.ndarray
    turns: np.ndarray
    pretext_labels: np.ndarray
    valid: np.ndarray
    size: int
    ops: np.ndarray
    amounts: np.ndarray


def take(plan: P, row: int) -> P:
    """The plan of one of its samples: the one row of each of its arrays."""
    rows: dict[str, Any] = {
        name: value[row : row + 1] for name, value in vars(plan).items() if isinstance(value, np.ndarray)
    }
    # Any plan is a dataclass.
    taken: P = replace(plan, **rows)  # type: ignore[type-var]
    return taken


def train_plan(
    view: View,
    task: PretextTask,
    seed: int,
    epochs: np.ndarray,
    ids: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    step: int = 0,
) -> Plan:
    """The plan of (N,) training samples; `step` matters only to a task that draws once per batch.

    Raises:
        LorotError: a window, box or erased rectangle reaches out of what it lies in; who has drawn it.
    """
    # One draw for all choices of the view: drawing costs by the call, hardly by the number.
    drawn = uniform(seed, epochs, ids, "view", num=3 + 2 * TRIES if view.crop == "random_resized" else 3)
    flips, places, tries = drawn[:, 0] < (0.5 if view.flip else 0.0), drawn[:, 1:3], drawn[:, 3:]
    if view.crop == "random_resized":
        windows = _random_resized(view, places, tries, heights, widths)
    elif view.crop == "pad":
        offsets = scale_to_integers(places, -view.padding, view.padding)
        windows = np.column_stack([offsets, heights, widths]).astype(np.int64)
    else:
        windows = _whole(heights, widths)
    if view.crop != "pad":
        _check_inside(windows, heights, widths, f"a window of crop {view.crop!r}")
    boxes, turns, labels = task.sample(seed, epochs, ids, view.size, step=step)
    rectangles = boxes[:, [0, 1, 2, 2]]
    _check_inside(rectangles, view.size, view.size, f"a box of pretext task {_name(task)!r}")
    valid = np.ones(len(ids), bool)
    ops, amounts = _operations(view.augment, seed, epochs, ids, view.size)
    return Plan(ids, epochs, windows, flips, boxes, turns, labels, valid, view.size, ops, amounts)


def eval_plan(view: View, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, valid: np.ndarray) -> Plan:
    """The plan of (N,) evaluation samples: a centre square after "random_resized", else the whole image.

    Its size is the view's `eval_size`, and nothing is augmented.
    """
    if view.crop == "random_resized":
        side = np.maximum(1, np.rint(view.eval_crop * np.minimum(heights, widths))).astype(np.int64)
        windows = np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1).astype(np.int64)
    else:
        windows = _whole(heights, widths)
    size = view.eval_size or view.size
    nothing, flips = np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
    boxes = np.tile(np.array([0, 0, size], dtype=np.int64), (len(ids), 1))
    ops, amounts = _operations((), 0, nothing, ids, size)
    return Plan(ids, nothing, windows, flips, boxes, nothing, nothing, valid, size, ops, amounts)


def _operations(
    augment: tuple[Augmentation, ...], seed: int, epochs: np.ndarray, ids: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, K) and amounts (N, K, 4) of all augmentations, one after the other."""
    drawn = []
    for augmentation in augment:
        codes, amounts = augmentation.sample(seed, epochs, ids, size)
        erased = amounts[codes == Operation.ERASE]
        _check_inside(erased, size, size, f"a rectangle of augmentation {_name(augmentation)!r}")
        drawn.append((codes, amounts))
    # So that no augmentation at all is K = 0.
    nothing = np.zeros((len(ids), 0), np.int64), np.zeros((len(ids), 0, 4), np.float32)
    all_codes, all_amounts = zip(nothing, *drawn, strict=True)
    return np.concatenate(all_codes, axis=1), np.concatenate(all_amounts, axis=1)


def _check_inside(rectangles: np.ndarray, height: np.ndarray | int, width: np.ndarray | int, what: str) -> None:
    """Raises LorotError if one of (N, 4) (y, x, height, width) is empty or reaches out of `height` x `width` pixels.

    What renders a plan trusts it, and would write where it must not.
    """
    y, x, tall, wide = rectangles.T
    # A difference cannot overflow here, as a sum could. What is no number is not inside.
    inside = (y >= 0) & (x >= 0) & (tall >= 1) & (wide >= 1)
    inside &= (y <= height - np.maximum(tall, 1)) & (x <= width - np.maximum(wide, 1))
    if not inside.all():
        row = int(np.argmin(inside))
        within = [int(np.broadcast_to(side, len(y))[row]) for side in (height, width)]
        raise LorotError(
            f"{what}, (y, x, height, width) = {tuple(rectangles[row].tolist())}, does not lie inside {within[0]} x "
            f"{within[1]} pixels, or is empty; y, x >= 0, sides >= 1, y + height <= {within[0]}, x + width <= "
            f"{within[1]} would work"
        )


def _name(part: object) -> str:
    """The file that a pretext task or an augmentation is found by."""
    return type(part).__module__.rpartition(".")[2]


def _whole(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    zeros = np.zeros(len(heights), np.int64)
    return np.stack([zeros, zeros, heights, widths], axis=1).astype(np.int64)


def _random_resized(
    view: View, places: np.ndarray, tries: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """Windows (N, 4) from uniforms (N, 2) and (N, 2 * TRIES), distributed as torchvision's RandomResizedCrop's."""
    low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
    shares = view.scale[0] + (view.scale[1] - view.scale[0]) * tries[:, 0::2]
    areas = shares * (heights * widths)[:, None]
    ratios = np.exp(low + (high - low) * tries[:, 1::2])
    tall = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    wide = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    fits = (tall > 0) & (wide > 0) & (tall <= heights[:, None]) & (wide <= widths[:, None])
    rows, first = np.arange(len(tries)), fits.argmax(axis=1)
    tall, wide, fitted = tall[rows, first], wide[rows, first], fits.any(axis=1)
    fallback_tall, fallback_wide = _largest(view, heights, widths)
    tall, wide = np.where(fitted, tall, fallback_tall), np.where(fitted, wide, fallback_wide)
    y = np.where(fitted, scale_to_integers(places[:, 0], 0, heights - tall), (heights - tall) // 2)
    x = np.where(fitted, scale_to_integers(places[:, 1], 0, widths - wide), (widths - wide) // 2)
    return np.stack([y, x, tall, wide], axis=1)


def _largest(view: View, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height and width (N,) of the largest window of an allowed ratio: what is taken where no try fitted."""
    ratios = widths / heights
    tall = np.where(ratios < view.ratio[0], np.rint(widths / view.ratio[0]), heights)
    wide = np.where(ratios > view.ratio[1], np.rint(heights * view.ratio[1]), widths)
    return (
        np.clip(tall, 1, heights).astype(np.int64),
        np.clip(wide, 1, widths).astype(np.int64),
    )
