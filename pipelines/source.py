"""What is loaded, and what a reader has to know of it."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from io import BytesIO
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from pipelines.errors import DataError, LorotError
from pipelines.manifest import Manifest
from pipelines.order import Order
from pipelines.plan import Plan, View, eval_plan, train_plan
from pipelines.pretext import PretextTask

# A sample in memory: an encoded file, or pixels (H, W, 3) uint8.
Sample = bytes | np.ndarray


class Planned(Protocol):
    """What every plan says of its N samples.

    Attributes:
        ids, epochs: (N,) int64. valid: (N,) bool, false for what fills up a last batch.
    """

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def epochs(self) -> np.ndarray: ...

    @property
    def valid(self) -> np.ndarray: ...


P = TypeVar("P", bound=Planned)
P_co = TypeVar("P_co", bound=Planned, covariant=True)


class Loadable(Protocol[P_co]):
    """What reading has to know of a source: where its samples lie, and how a batch of them is planned."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def on_bad_image(self) -> str: ...

    def plan_training(self, step: int, epochs: np.ndarray, ids: np.ndarray) -> P_co: ...

    def plan_evaluation(self, ids: np.ndarray, valid: np.ndarray) -> P_co: ...

    def blank(self) -> Sample: ...


@dataclass(frozen=True)
class Source:
    """What is loaded, and how it becomes the network's input.

    Attributes:
        manifest: the samples.
        view: windows, size and normalisation.
        task: the pretext task.
        seed: of the order and of everything drawn.
        render_pretext: turn the boxes. Otherwise the images are left as they are, and boxes, turns and labels of the
            pretext task come along for somebody else to use.
        limit: use this many samples only, drawn by the seed.
        on_bad_image: "error", or "skip": in training the next readable sample takes its place, in evaluation the
            sample counts nowhere.
        repeats: in training each sample comes this many times in a row, each time with other draws.
        sizes: (from which step, side of the input) in ascending order, for training; before the first, `view.size`.
        order: "global": any sample may follow any other; "blocks": neighbours in the manifest are read together.
        block: samples in such a block.
    """

    manifest: Manifest
    view: View
    task: PretextTask
    seed: int
    render_pretext: bool = True
    limit: int | None = None
    on_bad_image: str = "error"
    repeats: int = 1
    sizes: tuple[tuple[int, int], ...] = ()
    order: str = "global"
    block: int = 1024

    def __post_init__(self) -> None:
        if self.on_bad_image not in ("error", "skip"):
            raise LorotError(f"on_bad_image {self.on_bad_image!r} does not exist; there are error, skip")
        if self.order not in ("global", "blocks"):
            raise LorotError(f"order {self.order!r} does not exist; there are global, blocks")
        if self.block < 1 or self.repeats < 1:
            raise LorotError(f"block {self.block} and repeats {self.repeats} need to be at least 1")
        steps = [step for step, _ in self.sizes]
        if steps != sorted(set(steps)) or any(size < 1 for size in self.all_sizes):
            raise LorotError(f"sizes {self.sizes}: needs (step, size) with ascending steps and sizes of at least 1")
        if len(self.manifest) == 0:
            raise DataError(
                f"{self.manifest.name}: split {self.manifest.split!r} in {self.manifest.root} has no samples"
            )
        for size in self.all_sizes:
            try:
                self.task.sample(self.seed, 0, np.zeros(1, np.int64), size, step=0)
            except LorotError as error:
                raise LorotError(f"the pretext task does not fit an input of {size} x {size} pixels: {error}") from None

    @cached_property
    def sequence(self) -> Order:
        """The order of the samples in training."""
        return Order(self.seed, len(self.manifest), self.limit, self.block if self.order == "blocks" else 0)

    @property
    def all_sizes(self) -> tuple[int, ...]:
        """Every side of the input that training may ask for."""
        return tuple(sorted({self.view.size, *(size for _, size in self.sizes)}))

    def size_at(self, step: int) -> int:
        """Side of the input in training step `step`."""
        return next((size for start, size in reversed(self.sizes) if start <= step), self.view.size)

    def plan_training(self, step: int, epochs: np.ndarray, ids: np.ndarray) -> Plan:
        """What becomes of (N,) samples in training step `step`."""
        view = replace(self.view, size=self.size_at(step)) if self.sizes else self.view
        sizes = self.manifest.heights[ids], self.manifest.widths[ids]
        return train_plan(view, self.task, self.seed, epochs, ids, *sizes, step=step)

    def plan_evaluation(self, ids: np.ndarray, valid: np.ndarray) -> Plan:
        """What becomes of (N,) samples in evaluation; in the place of one that is not `valid` stands `blank`."""
        size = self.view.eval_size or self.view.size
        heights, widths = (np.where(valid, sides[ids], size) for sides in (self.manifest.heights, self.manifest.widths))
        return eval_plan(self.view, ids, heights, widths, valid)

    def blank(self) -> Sample:
        """What is rendered in evaluation in the place of a sample that is not there."""
        return blank(self.view.eval_size or self.view.size, self.manifest.encoded)


@lru_cache(maxsize=8)
def blank(size: int, encoded: bool) -> Sample:
    """A black image in the place of one that is not there: bytes of a JPEG, or (size, size, 3) uint8."""
    pixels = np.zeros((size, size, 3), np.uint8)
    if not encoded:
        return pixels
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()
