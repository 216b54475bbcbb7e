"""From a batch's number to its planned samples in memory: who is in it, their bytes, and what becomes of bad ones."""

import logging
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO

import numpy as np
from PIL import Image

from pipelines.errors import DataError, LorotError
from pipelines.manifest import Manifest
from pipelines.order import Order, evaluation_batch, num_accumulated, num_evaluation_batches, positions
from pipelines.plan import Plan, View, eval_plan, train_plan
from pipelines.pretext import PretextTask
from pipelines.soundness import UnsoundError, check

_log = logging.getLogger(__name__)


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
    """

    manifest: Manifest
    view: View
    task: PretextTask
    seed: int
    render_pretext: bool = True
    limit: int | None = None
    on_bad_image: str = "error"

    def __post_init__(self) -> None:
        if self.on_bad_image not in ("error", "skip"):
            raise LorotError(f"on_bad_image {self.on_bad_image!r} does not exist; there are error, skip")
        if len(self.manifest) == 0:
            raise DataError(
                f"{self.manifest.name}: split {self.manifest.split!r} in {self.manifest.root} has no samples"
            )

    @cached_property
    def order(self) -> Order:
        """The order of the samples in training."""
        return Order(self.seed, len(self.manifest), self.limit)


@dataclass(frozen=True)
class Slots:
    """The places of one batch, before it is known which samples can be read; arrays of (N,)."""

    epochs: np.ndarray
    places: np.ndarray
    ids: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class Training:
    """The batches of one worker in steps start_step to stop_step - 1, accumulation-major inside a step."""

    order: Order
    start_step: int
    stop_step: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int

    @cached_property
    def accumulated(self) -> int:
        """Batches in a step; raises LorotError if the global batch cannot be shared evenly."""
        return num_accumulated(self.world_size, self.micro_batch, self.global_batch)

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step) * self.accumulated

    def step(self, index: int) -> int:
        """The optimizer step that batch `index` belongs to."""
        return self.start_step + index // self.accumulated

    def slots(self, index: int) -> Slots:
        """Who is in batch `index`."""
        where = (self.step(index), index % self.accumulated, self.rank, self.world_size)
        epochs, places = self.order.places(positions(*where, self.micro_batch, self.global_batch))
        return Slots(epochs, places, self.order.members(places), np.ones(len(places), bool))


@dataclass(frozen=True)
class Evaluation:
    """The batches of one worker in a pass over all samples."""

    order: Order
    batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return num_evaluation_batches(len(self.order), self.batch_size, self.world_size)

    def slots(self, index: int) -> Slots:
        """Who is in batch `index`."""
        places, valid = evaluation_batch(index, self.rank, self.world_size, self.batch_size, len(self.order))
        return Slots(np.zeros(len(places), np.int64), places, self.order.members(places), valid)


@dataclass(frozen=True)
class Work:
    """A batch, ready to be rendered.

    Attributes:
        index: its number in its schedule.
        plan: of its N samples.
        samples: N encoded files (n,) or pixels (H, W, 3), uint8.
        skipped: ids that were to be in it and could not be read, with the reason.
    """

    index: int
    plan: Plan
    samples: list[np.ndarray]
    skipped: dict[int, str]


class Reader:
    """Reads batches in any order and from any thread; it remembers only which samples are bad."""

    def __init__(self, source: Source, schedule: Training | Evaluation) -> None:
        self.source = source
        self.schedule = schedule
        self._bad: dict[int, str] = {}

    def load(self, index: int) -> Work:
        """Batch `index`, planned and read.

        Raises:
            DataError: a sample cannot be read and `on_bad_image` is "error", or no sample at all can be.
        """
        slots = self.schedule.slots(index)
        skipped: dict[int, str] = {}
        if isinstance(self.schedule, Training):
            return self._load_training(index, self.schedule.step(index), slots, skipped)
        return self._load_evaluation(index, slots, skipped)

    def reject(self, sample: int, reason: str) -> None:
        """Take note that a sample was read but cannot be decoded; raises DataError if that is an error."""
        self._note(sample, f"{self.source.manifest.describe(sample)}: {reason}")

    def _load_training(self, index: int, step: int, slots: Slots, skipped: dict[int, str]) -> Work:
        source, manifest, order = self.source, self.source.manifest, self.source.order
        samples, ids = [], slots.ids.copy()
        for slot, sample in enumerate(slots.ids):
            data, place = self._read(int(sample), skipped), slots.places[slot]
            while data is None:
                # The next one that the limit keeps: without a limit, the next id.
                place = (place + 1) % len(order)
                ids[slot] = order.members(np.array([place]))[0]
                if ids[slot] == sample:
                    raise DataError(f"{manifest.root}: no image of split {manifest.split!r} can be read")
                data = self._read(int(ids[slot]), skipped)
            samples.append(data)
        sizes = manifest.heights[ids], manifest.widths[ids]
        plan = train_plan(source.view, source.task, source.seed, slots.epochs, ids, *sizes, step=step)
        return Work(index, plan, samples, skipped)

    def _load_evaluation(self, index: int, slots: Slots, skipped: dict[int, str]) -> Work:
        source, manifest = self.source, self.source.manifest
        empty = blank(source.view.size, manifest.encoded)
        heights, widths, valid = manifest.heights[slots.ids], manifest.widths[slots.ids], slots.valid.copy()
        samples = []
        for slot, sample in enumerate(slots.ids):
            data = self._read(int(sample), skipped) if valid[slot] else None
            if data is None:
                data, valid[slot], heights[slot], widths[slot] = empty, False, source.view.size, source.view.size
            samples.append(data)
        return Work(index, eval_plan(source.view, slots.ids, heights, widths, valid), samples, skipped)

    def _read(self, sample: int, skipped: dict[int, str]) -> np.ndarray | None:
        """The sample's data, or None with a note of why not."""
        manifest = self.source.manifest
        if sample not in self._bad:
            try:
                data = manifest.read(sample)
                if manifest.encoded:
                    check(data, int(manifest.heights[sample]), int(manifest.widths[sample]))
                return data
            except UnsoundError as error:
                self.reject(sample, str(error))
            except DataError as error:
                self._note(sample, str(error))
        skipped[sample] = self._bad[sample]
        return None

    def _note(self, sample: int, message: str) -> None:
        if self.source.on_bad_image == "error":
            raise DataError(f"{message}; repair or remove it, or leave such images out with data.on_bad_image=skip")
        if sample not in self._bad:
            _log.warning("left out: %s", message)
        self._bad[sample] = message


@lru_cache(maxsize=8)
def blank(size: int, encoded: bool) -> np.ndarray:
    """A black image in the place of one that is not there: (n,) uint8 bytes of a JPEG, or (size, size, 3) uint8."""
    pixels = np.zeros((size, size, 3), np.uint8)
    if not encoded:
        return pixels
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)
