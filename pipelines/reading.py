"""From a batch's number to its planned samples in memory: who is in it, their bytes, and what becomes of bad ones."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic

import numpy as np

from pipelines.errors import DataError, UnreachableError
from pipelines.order import Order, evaluation_batch, num_accumulated, num_evaluation_batches, positions
from pipelines.soundness import UnsoundError, sound
from pipelines.source import Loadable, P, Planned, Sample, Source

__all__ = ["Evaluation", "Reader", "Sample", "Slots", "Source", "Training", "Work"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slots:
    """The places of one batch, before it is known which samples can be read; arrays of (N,).

    Attributes:
        epochs: what draws are keyed by: with repeats, every repetition has an epoch of its own.
        places: in what the limit keeps.
        ids: of the samples.
        valid: false for what fills up a last batch.
    """

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
    repeats: int = 1

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
        turns, repeats = np.divmod(self._positions(index), self.repeats)
        epochs, places = self.order.places(turns)
        return Slots(epochs * self.repeats + repeats, places, self.order.members(places), np.ones(len(places), bool))

    def reach(self, index: int) -> tuple[int, int]:
        """The first and the last turn of batch `index` in the stream of samples, repetitions not counted."""
        where = self._positions(index) // self.repeats
        return int(where[0]), int(where[-1])

    def _positions(self, index: int) -> np.ndarray:
        where = (self.step(index), index % self.accumulated, self.rank, self.world_size)
        return positions(*where, self.micro_batch, self.global_batch)


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
class Work(Generic[P]):
    """A batch, ready to be rendered.

    Attributes:
        index: its number in its schedule.
        plan: of its N samples (`plan.Plan`, or `instance_plan.InstancePlan`).
        samples: N encoded files or pixels (H, W, 3) uint8.
        skipped: ids that were to be in it and could not be read, with the reason.
    """

    index: int
    plan: P
    samples: list[Sample]
    skipped: dict[int, str]


class Reader(Generic[P]):
    """Reads samples and puts batches together, in any order and from any thread; it remembers only who is bad.

    What a batch holds must not depend on what was read before it, or a resumed run would not be the same one. What
    reading says of a sample is said of all its bytes, and holds in every epoch. A decoder may fail in one window and
    not in another, so that what it says holds for the window that was asked for: that of one epoch.
    """

    def __init__(self, source: Loadable[P], schedule: Training | Evaluation) -> None:
        self.source = source
        self.schedule = schedule
        self._heights, self._widths = source.manifest.heights, source.manifest.widths
        # Why a sample cannot be used: by id, what reading says; by epoch and id, what a decoder says.
        self._bad: dict[int, str] = {}
        self._damaged: dict[tuple[int, int], str] = {}
        # Those that a decoder failed at in some epoch.
        self._suspects: set[int] = set()
        self._warned: set[int] = set()
        # Up to which block of the endless stream the storage was told.
        self._told: int | None = None

    def slots(self, index: int) -> Slots:
        """Who is in batch `index`."""
        return self.schedule.slots(index)

    def wanted(self, slots: Slots) -> list[int]:
        """The samples to read for a batch, each once, in the order in which they lie in the data set."""
        return np.unique(slots.ids[slots.valid]).tolist()

    def size_of(self, samples: list[int], guess: int) -> int:
        """Bytes of these samples: the exact number if it is known before they are read; else `guess`, or by pixels."""
        manifest = self.source.manifest
        pixels = int(np.sum(self._heights[samples] * self._widths[samples]))
        if not manifest.encoded:
            return 3 * pixels
        if samples and manifest.location(samples[0])[2] is not None:
            return sum(manifest.location(sample)[2] or 0 for sample in samples)
        # Photographs take 1 to 4 bits a pixel.
        return guess or pixels // 2

    def read(self, sample: int) -> Sample | None:
        """One sample that is whole, or None: it is bad, and `complete` says what that means for its batch.

        Raises:
            UnreachableError: as `fetch`.
        """
        data = self.fetch(sample)
        return None if data is None else self.check(sample, data)

    def fetch(self, sample: int) -> Sample | None:
        """One sample as it is stored, or None: it is bad.

        Raises:
            UnreachableError: the storage is away, and no sample is to blame.
        """
        if sample in self._bad:
            return None
        try:
            return self.source.manifest.read(sample)
        except UnreachableError:
            raise
        except DataError as error:
            self._bad[sample] = str(error)
        return None

    def check(self, sample: int, data: Sample) -> Sample | None:
        """What a decoder is given for a sample that was read, or None: it is bad. May take a processor for long."""
        if not isinstance(data, bytes):
            return data
        try:
            return sound(data, int(self._heights[sample]), int(self._widths[sample]))
        except UnsoundError as error:
            self._bad[sample] = f"{self.source.manifest.describe(sample)}: {error}"
        return None

    def complete(
        self, index: int, slots: Slots, data: Mapping[int, Sample | None], read: Callable[[int], Sample | None]
    ) -> Work[P]:
        """Batch `index`, planned.

        Args:
            data: what was read of the batch's samples, by id.
            read: reads and checks what is to take the place of a bad one.

        Raises:
            DataError: a sample cannot be read and `on_bad_image` is "error", or no sample at all can be.
        """
        skipped: dict[int, str] = {}
        if isinstance(self.schedule, Training):
            return self._complete_training(index, self.schedule.step(index), slots, data, read, skipped)
        return self._complete_evaluation(index, slots, data, skipped)

    def reject(self, sample: int, epoch: int, reason: str) -> None:
        """Take note that what an epoch shows of a sample cannot be decoded; raises DataError if that is an error."""
        self._damaged[epoch, sample] = f"{self.source.manifest.describe(sample)}: {reason}"
        self._suspects.add(sample)
        self._skip(sample, epoch, {})

    def suspects(self, plan: Planned) -> list[int]:
        """Rows of a plan with samples that a decoder has failed at, if in another epoch."""
        ids, valid = plan.ids.tolist(), plan.valid.tolist()
        return [row for row, sample in enumerate(ids) if valid[row] and sample in self._suspects]

    def upcoming(self, index: int) -> list[tuple[str, int, int]]:
        """Ranges (path, offset, size) that the storage should begin to read when batch `index` is asked for.

        In block order these are the blocks up to WINDOW beyond the batch, each once and in one piece; else none.
        """
        order = self.schedule.order
        if not order.block or not isinstance(self.schedule, Training) or not self.source.manifest.encoded:
            return []
        last = order.latest_block(self.schedule.reach(index)[1])
        first = order.earliest_block(self.schedule.reach(index)[0]) if self._told is None else self._told + 1
        self._told = max(last, first - 1)
        numbers = np.arange(first, last + 1)
        starts, lengths = order.blocks(np.zeros(len(numbers), np.int64), numbers)
        return [piece for start, length in zip(starts, lengths, strict=True) for piece in self._pieces(start, length)]

    def _pieces(self, start: int, length: int) -> list[tuple[str, int, int]]:
        """The ranges of the samples at `length` places from `start` on."""
        manifest = self.source.manifest
        samples = self.schedule.order.members(np.arange(start, start + length)).tolist()
        if manifest.location(samples[0])[0] == manifest.location(samples[-1])[0]:
            # The samples of a shard lie in it as in the manifest.
            samples = [samples[0], samples[-1]]
        pieces: dict[str, tuple[int, int]] = {}
        for sample in samples:
            path, offset, size = manifest.location(sample)
            if size is None:
                return []
            begin, end = pieces.get(path, (offset, offset))
            pieces[path] = min(begin, offset), max(end, offset + size)
        return [(path, begin, end - begin) for path, (begin, end) in pieces.items()]

    def _complete_training(
        self,
        index: int,
        step: int,
        slots: Slots,
        data: Mapping[int, Sample | None],
        read: Callable[[int], Sample | None],
        skipped: dict[int, str],
    ) -> Work[P]:
        source, manifest, order = self.source, self.source.manifest, self.schedule.order
        samples: list[Sample] = []
        ids = slots.ids.copy()
        for slot, (sample, epoch) in enumerate(zip(slots.ids.tolist(), slots.epochs.tolist(), strict=True)):
            found, place = None if self._fault(sample, epoch) else data[sample], slots.places[slot]
            chosen = sample
            while found is None:
                self._skip(chosen, epoch, skipped)
                # The next one that the limit keeps: without a limit, the next id.
                place = (place + 1) % len(order)
                chosen = int(order.members(np.array([place]))[0])
                if chosen == sample:
                    raise DataError(f"{manifest.root}: no image of split {manifest.split!r} can be read")
                if self._fault(chosen, epoch) is None:
                    found = data.get(chosen)
                    found = read(chosen) if found is None else found
            ids[slot] = chosen
            samples.append(found)
        plan = source.plan_training(step, slots.epochs, ids)
        return Work(index, plan, samples, skipped)

    def _complete_evaluation(
        self, index: int, slots: Slots, data: Mapping[int, Sample | None], skipped: dict[int, str]
    ) -> Work[P]:
        valid, empty = slots.valid.copy(), self.source.blank()
        samples: list[Sample] = []
        for slot, sample in enumerate(slots.ids.tolist()):
            epoch = int(slots.epochs[slot])
            found = data[sample] if valid[slot] and self._fault(sample, epoch) is None else None
            if found is None and valid[slot]:
                self._skip(sample, epoch, skipped)
                valid[slot] = False
            samples.append(empty if found is None else found)
        return Work(index, self.source.plan_evaluation(slots.ids, valid), samples, skipped)

    def _fault(self, sample: int, epoch: int) -> str | None:
        """Why a sample cannot be used in an epoch, as far as that is known; None if it can."""
        return self._bad.get(sample) or self._damaged.get((epoch, sample))

    def _skip(self, sample: int, epoch: int, skipped: dict[int, str]) -> None:
        """Leave out a bad sample, or raise DataError if it may not be left out."""
        message = self._fault(sample, epoch)
        assert message is not None
        if self.source.on_bad_image == "error":
            raise DataError(f"{message}; repair or remove it, or leave such images out with data.on_bad_image=skip")
        if sample not in self._warned:
            self._warned.add(sample)
            _log.warning("left out: %s", message)
        skipped[sample] = message
