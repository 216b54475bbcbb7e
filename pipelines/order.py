"""Which sample comes when: a stateless permutation, and its division among workers.

Training reads one endless stream of positions. Epoch e of a set of L samples is positions e * L to (e + 1) * L - 1, and
step s of global batch G takes positions s * G to (s + 1) * G - 1, so that no sample is dropped or repeated at the end
of an epoch: a batch may straddle two of them.

The permutation is a Feistel network (Luby and Rackoff, "How to construct pseudorandom permutations", 1988) over the
cells of an almost square table, after Black and Rogaway ("Ciphers with arbitrary finite domains", 2002). The few cells
beyond the set's length are encrypted again until they fall inside ("cycle walking"). It needs no memory, whatever the
length.
"""

import math
from dataclasses import dataclass

import numpy as np

from pipelines.errors import LorotError
from pipelines.randomness import stream_words

ROUNDS = 8
# A table of two or three rows reaches only a part of all permutations.
FEWEST_ROWS = 8
MOST_BITS = 62
HALF = np.uint64(32)


@dataclass(frozen=True)
class Order:
    """The order of a training set.

    Attributes:
        seed: two seeds are two unrelated orders.
        length: samples in the set, up to 2**62.
        limit: keep this many samples only, the same ones in every epoch, drawn by the seed.
    """

    seed: int
    length: int
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 2**MOST_BITS:
            raise LorotError(f"an order needs 1 to 2**{MOST_BITS} samples, not {self.length}")
        if self.limit is not None and not 1 <= self.limit <= self.length:
            raise LorotError(
                f"a limit of {self.limit} samples does not fit a set of {self.length}; use 1 to {self.length}"
            )

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
        return epochs, permute(turns, len(self), self.seed, epochs, stream="order")

    def members(self, places: np.ndarray) -> np.ndarray:
        """Sample ids (N,) of places 0..len - 1 in what the limit keeps; without a limit, the places themselves."""
        if self.limit is None:
            return places
        return permute(places, self.length, self.seed, 0, stream="subset")


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
