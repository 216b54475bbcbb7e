"""Which sample comes when: a stateless permutation, and its division among workers.

Training reads one endless stream of positions. Epoch e of a set of L samples is positions e * L to (e + 1) * L - 1, and
step s of global batch G takes positions s * G to (s + 1) * G - 1, so that no sample is dropped or repeated at the end
of an epoch: a batch may straddle two of them.

The permutation is a Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations", 1988) over the
cells of an almost square table, after Black and Rogaway ("Ciphers with arbitrary finite domains", 2002). The few cells
beyond the set's length are encrypted again until they fall inside ("cycle walking"). It needs no memory, whatever the
length.

In block order, for disks that read well only what lies together, an epoch is a permutation of blocks of consecutive
samples, and samples change places only within a window of WINDOW blocks: reading then goes through the blocks one after
the other, WINDOW of them at once in memory or in the kernel's page cache.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.errors import LorotError
from pipelines.randomness import integers, stream_words

ROUNDS = 8
# A table of two or three rows reaches only a part of all permutations.
FEWEST_ROWS = 8
MOST_BITS = 62
HALF = np.uint64(32)
# Blocks whose samples are mixed with each other.
WINDOW = 16
# Up to so many blocks an epoch's order of them is kept, which saves working it out for every batch.
MOST_LISTED = 4096


@dataclass(frozen=True)
class Order:
    """The order of a training set.

    Attributes:
        seed: two seeds are two unrelated orders.
        length: samples in the set, up to 2**62.
        limit: keep this many samples only, the same ones in every epoch, drawn by the seed.
        block: samples in a block of block order; 0 for the global order, in which any sample may follow any other.
    """

    seed: int
    length: int
    limit: int | None = None
    block: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 2**MOST_BITS:
            raise LorotError(f"an order needs 1 to 2**{MOST_BITS} samples, not {self.length}")
        if self.limit is not None and not 1 <= self.limit <= self.length:
            raise LorotError(
                f"a limit of {self.limit} samples does not fit a set of {self.length}; use 1 to {self.length}"
            )
        if not 0 <= self.block <= 2**32:
            raise LorotError(f"a block of {self.block} samples; use 1 to 2**32, or 0 for the global order")

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self.length if self.limit is None else self.limit

    def samples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sample ids, both (N,) int64, at (N,) positions of the endless stream."""
        epochs, places = self.places(positions)
        return epochs, self.members(places)

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs, and places in what the limit keeps, both (N,) int64, at (N,) positions of the endless stream."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, turns = np.divmod(positions, len(self))
        if self.block:
            return epochs, self._in_blocks(epochs, self._mixed(epochs, turns))
        return epochs, permute(turns, len(self), self.seed, epochs, stream="order")

    def members(self, places: np.ndarray) -> np.ndarray:
        """Sample ids (N,) of places 0..len - 1 in what the limit keeps; without a limit, the places themselves.

        In block order they ascend with the places: one sample is drawn from each of `limit` equal stretches of the set.
        """
        if self.limit is None:
            return places
        if not self.block:
            return permute(places, self.length, self.seed, 0, stream="subset")
        least, longer = divmod(self.length, self.limit)
        starts = places * least + np.minimum(places, longer)
        return starts + integers(self.seed, 0, places, "stretch", 0, least - 1 + (places < longer))

    def blocks(self, epochs: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First places and lengths, both (N,) int64, of the blocks read as number 0, 1, ... of (N,) epochs.

        Beyond an epoch's last block the next epoch's follow.
        """
        more, numbers = np.divmod(np.asarray(numbers, np.int64), self.num_blocks)
        epochs = np.asarray(epochs, np.int64) + more
        turns = numbers * self.block
        # The short block shifts what comes after it.
        turns -= np.where(numbers > self._short_turns(epochs), self.block - self._short_length, 0)
        firsts = self._in_blocks(epochs, turns)
        return firsts, np.minimum(self.block, len(self) - firsts)

    def earliest_block(self, position: int) -> int:
        """The first block, counted through all epochs, that is mixed with what comes at `position` of the stream."""
        epoch, turn = divmod(position, len(self))
        return epoch * self.num_blocks + turn // (WINDOW * self.block) * WINDOW

    def latest_block(self, position: int) -> int:
        """The last block, counted through all epochs, to have begun with when `position` of the stream is read.

        A window's length beyond: then what the position is mixed with is there too, and each next block costs one more.
        """
        epoch, turn = divmod(position, len(self))
        return epoch * self.num_blocks + turn // self.block + WINDOW

    @property
    def num_blocks(self) -> int:
        """Blocks in an epoch, the last of them possibly short."""
        return -(-len(self) // self.block)

    @property
    def _short_length(self) -> int:
        return len(self) - (self.num_blocks - 1) * self.block

    def _short_turns(self, epochs: np.ndarray) -> np.ndarray:
        """When in the order of blocks, (N,) int64, the set's last block comes in each epoch: it may be a short one."""
        return integers(self.seed, epochs, np.zeros(len(epochs), np.int64), "short block", 0, self.num_blocks - 1)

    def _mixed(self, epochs: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """The turns 0..len - 1 (N,) with those within each window of blocks exchanged."""
        whole = WINDOW * self.block
        windows, inside = np.divmod(turns, whole)
        last = len(self) // whole
        mixed = np.empty_like(turns)
        for chosen, length in ((windows < last, whole), (windows == last, len(self) - last * whole)):
            if chosen.any():
                keys = epochs[chosen] * (last + 1) + windows[chosen]
                mixed[chosen] = permute(inside[chosen], length, self.seed, keys, stream="window")
        return windows * whole + mixed

    def _in_blocks(self, epochs: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """The places (N,) at turns 0..len - 1 of an order in which only the blocks have changed places."""
        full = self.num_blocks - 1
        short_starts = self._short_turns(epochs) * self.block
        short_ends = short_starts + self._short_length
        in_short = (turns >= short_starts) & (turns < short_ends)
        if not full:
            return turns
        # A turn in the short block is none of the others': any will do for it.
        others = np.where(in_short, 0, turns - np.where(turns >= short_ends, self._short_length, 0))
        numbers, inside = np.divmod(others, self.block)
        if full <= MOST_LISTED:
            moved = numbers.copy()
            for epoch in np.unique(epochs).tolist():
                moved = np.where(epochs == epoch, _block_list(self.seed, full, epoch)[numbers], moved)
        else:
            moved = permute(numbers, full, self.seed, epochs, stream="blocks")
        places = moved * self.block + inside
        return np.where(in_short, full * self.block + turns - short_starts, places)


@lru_cache(maxsize=4)
def _block_list(seed: int, length: int, epoch: int) -> np.ndarray:
    """All of one epoch's blocks in order: a batch needs few of them, and of a short list `permute` takes long."""
    return permute(np.arange(length), length, seed, epoch, stream="blocks")


def permute(places: np.ndarray, length: int, seed: int, epoch: int | np.ndarray, stream: str) -> np.ndarray:
    """Where a permutation of 0..length - 1, one for each (seed, epoch, stream), takes (N,) places; int64."""
    rows = max(FEWEST_ROWS, math.isqrt(length - 1) + 1)
    columns = max(FEWEST_ROWS, -(-length // rows))
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.uint64), np.shape(places))
    words = np.array(stream_words(seed, stream, num=ROUNDS), dtype=np.uint64)
    keys = _mix(_mix(epochs + words[0])[None, :] + words[:, None])
    values = _encrypt(np.asarray(places, dtype=np.uint64), keys, rows, columns)
    outside = np.flatnonzero(values >= length)
    while outside.size:
        values[outside] = _encrypt(values[outside], keys[:, outside], rows, columns)
        outside = outside[values[outside] >= length]
    return values.astype(np.int64)


def positions(
    step: int, accumulation_index: int, rank: int, world_size: int, micro_batch: int, global_batch: int
) -> np.ndarray:
    """The (micro_batch,) int64 positions that one worker forwards at once.

    Micro-batch j of a step goes to rank j % world_size as its micro-batch j // world_size. What is forwarded together,
    and so BatchNorm's statistics, is the same at any world size.

    Raises:
        LorotError: the global batch is no multiple of world_size * micro_batch.
    """
    num_accumulated(world_size, micro_batch, global_batch)
    index = accumulation_index * world_size + rank
    start = step * global_batch + index * micro_batch
    return np.arange(start, start + micro_batch, dtype=np.int64)


def num_accumulated(world_size: int, micro_batch: int, global_batch: int) -> int:
    """Micro-batches of one worker in one step; raises LorotError if the global batch cannot be shared evenly."""
    if global_batch % (world_size * micro_batch):
        raise LorotError(
            f"global_batch {global_batch} is no multiple of {world_size} workers x micro_batch {micro_batch}; "
            f"use {max(1, global_batch // (world_size * micro_batch)) * world_size * micro_batch}"
        )
    return global_batch // (world_size * micro_batch)


def num_evaluation_batches(length: int, batch_size: int, world_size: int) -> int:
    """Batches of every rank: the same for all, so that collective operations meet."""
    return -(-length // (batch_size * world_size))


def evaluation_batch(
    index: int, rank: int, world_size: int, batch_size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (B,) int64 and valid (B,) bool of one rank's batch number `index`.

    Batch b of the set goes to rank b % world_size. What lies beyond the end is padding: id 0, not valid.
    """
    start = (index * world_size + rank) * batch_size
    ids = np.arange(start, start + batch_size, dtype=np.int64)
    valid = ids < length
    return np.where(valid, ids, 0), valid


def _encrypt(values: np.ndarray, keys: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """One pass of the network over (N,) uint64 values below rows * columns with (ROUNDS, N) keys."""
    left, right = np.divmod(values, np.uint64(columns))
    for number in range(0, ROUNDS, 2):
        left = (left + _below(rows, right + keys[number])) % np.uint64(rows)
        right = (right + _below(columns, left + keys[number + 1])) % np.uint64(columns)
    return left * np.uint64(columns) + right


def _below(bound: int, values: np.ndarray) -> np.ndarray:
    """Numbers 0..bound - 1 that depend on all bits of (N,) values; bound < 2**32."""
    values = (values ^ values >> HALF) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> HALF) * np.uint64(0x94D049BB133111EB)
    return (values >> HALF) * np.uint64(bound) >> HALF


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits that leaves no bit of its input in place: the end of splitmix64 (Steele et al., 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
