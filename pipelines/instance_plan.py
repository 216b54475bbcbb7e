"""What is to be done with each image of a batch and the objects in it: sizes and flips, before a pixel is read."""

from dataclasses import dataclass

import numpy as np

from pipelines.errors import LorotError
from pipelines.instance_columns import NOTHING, InstanceTable, Objects
from pipelines.randomness import scale_to_integers, uniform


@dataclass(frozen=True)
class InstanceView:
    """How a source image becomes the network's input: resized with its ratio kept, mirrored, normalised, padded.

    Attributes:
        short_sides: training draws one of them for the short side, evaluation takes the last; pixels.
        long_side: the long side becomes no longer than this; then the short one is shorter than drawn.
        flip: mirror half of the training images.
        mean, std: of R, G, B, on a scale of 0 to 1.
        divisor: height and width of a batch are multiples of it.
    """

    short_sides: tuple[int, ...] = (800,)
    long_side: int = 1333
    flip: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    divisor: int = 32

    def __post_init__(self) -> None:
        if not self.short_sides or min(self.short_sides) < 1:
            raise LorotError(f"short_sides {self.short_sides}: write at least one number of pixels, as (800,)")
        if self.long_side < max(self.short_sides):
            raise LorotError(
                f"long_side {self.long_side} is less than a short side of {max(self.short_sides)}; "
                f"{max(self.short_sides)} or more would work"
            )
        if self.divisor < 1:
            raise LorotError(f"divisor {self.divisor}: write at least 1, as 32")
        if min(self.std) <= 0:
            raise LorotError(f"std {self.std}: needs three numbers above 0")


@dataclass(frozen=True)
class InstancePlan:
    """Everything that is decided about N images before a pixel is read.

    Attributes:
        ids, epochs: (N,) int64.
        source_sizes: (N, 2) int64 (height, width) of the images as shown.
        sizes: (N, 2) int64 (height, width) after resizing.
        flips: (N,) bool, mirror left to right after resizing.
        valid: (N,) bool, false for what fills up a last batch.
        objects: (N,) of `Objects`, in source pixels.
        canvas: (height, width) of the whole batch: the contents lie in its top left corner.
    """

    ids: np.ndarray
    epochs: np.ndarray
    source_sizes: np.ndarray
    sizes: np.ndarray
    flips: np.ndarray
    valid: np.ndarray
    objects: np.ndarray
    canvas: tuple[int, int]


def train_plan(
    view: InstanceView, seed: int, epochs: np.ndarray, ids: np.ndarray, source_sizes: np.ndarray, table: InstanceTable
) -> InstancePlan:
    """The plan of (N,) training images.

    Groups of objects (crowds) are left out, as torchvision's references do, and so are boxes without area in the image.
    """
    drawn = uniform(seed, epochs, ids, "instances", num=2)
    flips = drawn[:, 0] < (0.5 if view.flip else 0.0)
    short_sides = np.array(view.short_sides, np.int64)[scale_to_integers(drawn[:, 1], 0, len(view.short_sides) - 1)]
    sizes = resized(source_sizes, short_sides, view.long_side)
    found = [table.of(sample) for sample in ids.tolist()]
    objects = _listed([own.where(~own.crowd & own.visible) for own in found])
    valid = np.ones(len(ids), bool)
    return InstancePlan(ids, epochs, source_sizes, sizes, flips, valid, objects, _canvas(sizes, view.divisor))


def eval_plan(
    view: InstanceView, ids: np.ndarray, source_sizes: np.ndarray, valid: np.ndarray, table: InstanceTable
) -> InstancePlan:
    """The plan of (N,) evaluation images: the view's last short side, not mirrored, crowds included.

    What is not `valid` has no objects and is not resized. Boxes without area in the image are no targets of a network
    here either; a score takes them from the manifest.
    """
    nothing, flips = np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
    sizes = resized(source_sizes, np.full(len(ids), view.short_sides[-1], np.int64), view.long_side)
    sizes = np.where(valid[:, None], sizes, source_sizes)
    objects = _listed(
        [
            own.where(own.visible)
            for own in (table.of(sample) if real else NOTHING for sample, real in zip(ids.tolist(), valid, strict=True))
        ]
    )
    return InstancePlan(ids, nothing, source_sizes, sizes, flips, valid, objects, _canvas(sizes, view.divisor))


def resized(sizes: np.ndarray, short_sides: np.ndarray, long_side: int) -> np.ndarray:
    """(N, 2) int64 sizes after the short side is brought to `short_sides` (N,), the long one to `long_side` at most.

    The rule of torchvision's detection models: one factor for both sides, and what is left of a pixel is cut off (so a
    side may become one pixel shorter than asked for).
    """
    factors = np.minimum(short_sides / sizes.min(axis=1), long_side / sizes.max(axis=1))
    cut: np.ndarray = np.maximum(np.floor(sizes * factors[:, None]), 1).astype(np.int64)
    return cut


def moved_boxes(plan: InstancePlan, row: int) -> np.ndarray:
    """(K, 4) float32 boxes of one of a plan's images, in pixels of its content."""
    height, width = plan.sizes[row].tolist()
    old_height, old_width = plan.source_sizes[row].tolist()
    factors = np.array([width / old_width, height / old_height] * 2, np.float32)
    # Rounding may carry a corner over the edge.
    boxes: np.ndarray = np.clip(plan.objects[row].boxes * factors, 0, np.array([width, height] * 2, np.float32))
    if plan.flips[row]:
        boxes[:, [0, 2]] = np.float32(width) - boxes[:, [2, 0]]
    return boxes


def _canvas(sizes: np.ndarray, divisor: int) -> tuple[int, int]:
    height, width = (-(-int(side) // divisor) * divisor for side in sizes.max(axis=0))
    return height, width


def _listed(objects: list[Objects]) -> np.ndarray:
    """(N,) array of objects, so that a row of it is taken as of any other."""
    listed = np.empty(len(objects), object)
    listed[:] = objects
    return listed
