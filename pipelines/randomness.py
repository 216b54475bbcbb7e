"""Random numbers without state: each is a pure function of (seed, epoch, sample id, stream).

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over
samples. A stream names what a number is used for ("flip", "crop", ...), so that two choices for one sample never share
one.
"""

import hashlib
from functools import lru_cache

import numpy as np

MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
ROUNDS = 10
LOW_WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)


def philox(counters: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Encrypt counters with Philox4x32-10.

    Args:
        counters: (4, ...) uint64 holding 32-bit words.
        key: (2,) uint64 holding 32-bit words.

    Returns:
        (4, ...) uint64 holding random 32-bit words.
    """
    shape = counters.shape
    counters = counters.reshape(4, -1)
    even, odd = counters[0::2], counters[1::2]
    for round_key in _round_keys(int(key[0]), int(key[1])):
        product = even * MULTIPLIERS
        # The two halves of the state change places at every round: hence the reversed rows.
        even = (product[::-1] >> WORD_BITS) ^ odd ^ round_key
        odd = product[::-1] & LOW_WORD
    words = np.empty_like(counters)
    words[0::2], words[1::2] = even, odd
    return words.reshape(shape)


def uniform(seed: int, epoch: int | np.ndarray, ids: np.ndarray, stream: str, num: int = 1) -> np.ndarray:
    """(N, num) float64 in [0, 1), of 53 random bits each.

    Args:
        seed: the job's seed, 0 <= seed < 2**64.
        epoch: one number for all samples, or (N,); below 2**32.
        ids: (N,) sample ids, or whatever else a choice is made for.
        stream: what the numbers are for.
        num: numbers per sample. The first columns do not depend on it.
    """
    ids = np.asarray(ids, dtype=np.uint64)
    blocks = (num + 1) // 2
    counters = np.empty((4, ids.size, blocks), dtype=np.uint64)
    counters[0] = (ids & LOW_WORD)[:, None]
    counters[1] = (ids >> WORD_BITS)[:, None]
    counters[2] = np.asarray(epoch, dtype=np.uint64).reshape(-1, 1)
    counters[3] = np.arange(blocks, dtype=np.uint64)
    words = philox(counters, stream_key(seed, stream))
    bits = (words[0::2] << WORD_BITS | words[1::2]) >> np.uint64(11)
    return (bits.transpose(1, 2, 0).reshape(ids.size, 2 * blocks)[:, :num]) * 2.0**-53


def integers(
    seed: int, epoch: int | np.ndarray, ids: np.ndarray, stream: str, low: int | np.ndarray, high: int | np.ndarray
) -> np.ndarray:
    """(N,) int64, uniform on low..high with both ends included; `low` and `high` are numbers or (N,)."""
    return scale_to_integers(uniform(seed, epoch, ids, stream)[:, 0], low, high)


def scale_to_integers(numbers: np.ndarray, low: int | np.ndarray, high: int | np.ndarray) -> np.ndarray:
    """Map uniforms in [0, 1) onto integers low..high, both ends included; the bias is below (high - low) / 2**53."""
    span = np.asarray(high, dtype=np.int64) - low + 1
    # A product with a span beyond 2**53 can round up to the span itself.
    return low + np.minimum((numbers * span).astype(np.int64), span - 1)


@lru_cache(maxsize=256)
def stream_words(seed: int, stream: str, num: int = 1) -> tuple[int, ...]:
    """`num` 64-bit words that are fixed by (seed, stream), the same on every machine and Python."""
    digest = hashlib.blake2b(stream.encode(), digest_size=8 * num, key=int(seed).to_bytes(8, "little")).digest()
    return tuple(int.from_bytes(digest[start : start + 8], "little") for start in range(0, 8 * num, 8))


def stream_key(seed: int, stream: str) -> np.ndarray:
    """The (2,) uint64 Philox key of (seed, stream)."""
    (word,) = stream_words(seed, stream)
    return np.array([word & 0xFFFFFFFF, word >> 32], dtype=np.uint64)


@lru_cache(maxsize=256)
def _round_keys(first: int, second: int) -> tuple[np.ndarray, ...]:
    key = np.array([[first], [second]], dtype=np.uint64)
    return tuple(key + np.uint64(number) * KEY_STEPS & LOW_WORD for number in range(ROUNDS))
