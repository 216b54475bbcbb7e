"""Block order: an exact permutation, near together on disk, and still mixed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.errors import LorotError
from pipelines.order import WINDOW, Order

LENGTHS = st.integers(1, 5000)
BLOCKS = st.integers(1, 300)


def epoch_of(order, epoch):
    """All ids of one epoch, in order."""
    epochs, ids = order.samples(np.arange(epoch * len(order), (epoch + 1) * len(order)))
    assert (epochs == epoch).all()
    return ids


@given(LENGTHS, BLOCKS, st.integers(0, 2**63), st.integers(0, 1000))
def test_an_epoch_is_a_permutation_at_any_length_and_block(length, block, seed, epoch):
    assert sorted(epoch_of(Order(seed, length, block=block), epoch)) == list(range(length))


@given(LENGTHS, BLOCKS, st.integers(0, 2**63), st.data())
def test_a_limit_keeps_that_many_different_samples_the_same_in_every_epoch(length, block, seed, data):
    limit = data.draw(st.integers(1, length))
    order = Order(seed, length, limit, block)
    first, other = (set(epoch_of(order, epoch).tolist()) for epoch in (0, 7))
    kept = order.members(np.arange(limit))
    assert len(first) == limit
    assert first == other == set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert 0 <= kept[0] <= kept[-1] < length


@given(LENGTHS, BLOCKS, st.integers(0, 2**63), st.integers(0, 20))
def test_positions_are_answered_alike_one_by_one_and_together(length, block, seed, start):
    order = Order(seed, length, block=block)
    asked = np.arange(start, start + 20)
    together = order.samples(asked)
    alone = [order.samples(asked[i : i + 1]) for i in range(20)]
    for part in (0, 1):
        np.testing.assert_array_equal(together[part], np.concatenate([answer[part] for answer in alone]))


@given(LENGTHS, BLOCKS, st.integers(0, 2**63), st.integers(0, 9))
def test_the_blocks_of_an_epoch_are_listed_as_they_are_read(length, block, seed, epoch):
    order = Order(seed, length, block=block)
    firsts, sizes = order.blocks(np.full(order.num_blocks, epoch), np.arange(order.num_blocks))
    listed = [np.arange(first, first + size) for first, size in zip(firsts, sizes, strict=True)]
    assert sorted(np.concatenate(listed)) == list(range(length))
    assert (firsts % block == 0).all()
    # What is read in a window of turns is what the blocks of these turns hold: nothing from elsewhere.
    flat, ids = np.concatenate(listed), epoch_of(order, epoch)
    for start in range(0, length, WINDOW * block):
        stop = start + WINDOW * block
        assert sorted(flat[start:stop]) == sorted(ids[start:stop])


def test_after_the_last_block_come_those_of_the_next_epoch():
    order = Order(1, 1000, block=30)
    beyond = order.blocks(np.array([2, 2]), np.array([34, 40]))
    np.testing.assert_array_equal(beyond, order.blocks(np.array([3, 3]), np.array([0, 6])))


# Below, an epoch's list of blocks takes milliseconds to make. Without lists the blocks of all epochs are worked out
# together, which has to come to the same.


def test_within_a_window_every_sample_is_equally_likely_at_every_turn(monkeypatch):
    # One window that holds two blocks and the short one.
    order = Order(5, 25, block=10)
    counts, turns = np.zeros((25, 25)), np.arange(2000 * 25)
    listed = order.samples(turns[: 50 * 25])
    monkeypatch.setattr("pipelines.order.MOST_LISTED", 0)
    epochs, ids = order.samples(turns)
    np.testing.assert_array_equal(listed, (epochs[: 50 * 25], ids[: 50 * 25]))
    np.add.at(counts, (turns % 25, ids), 1)
    assert stats.chisquare(counts, axis=None).pvalue > 1e-3


def test_every_block_is_equally_likely_to_be_read_at_every_turn_the_short_one_included(monkeypatch):
    order = Order(3, 45, block=10)
    counts, turns = np.zeros((5, 5)), np.arange(3000 * 5)
    epochs, numbers = np.divmod(turns, 5)
    listed = order.blocks(epochs[: 50 * 5], numbers[: 50 * 5])
    monkeypatch.setattr("pipelines.order.MOST_LISTED", 0)
    firsts, lengths = order.blocks(epochs, numbers)
    np.testing.assert_array_equal(listed, (firsts[: 50 * 5], lengths[: 50 * 5]))
    np.add.at(counts, (numbers, firsts // 10), 1)
    assert stats.chisquare(counts, axis=None).pvalue > 1e-3


def test_windows_epochs_and_neighbours_are_unrelated():
    order = Order(0, 64_000, block=500)
    first, second = (epoch_of(order, epoch) for epoch in (0, 1))
    assert abs(stats.spearmanr(first[:8000], first[8000:16000]).statistic) < 0.05
    assert abs(stats.spearmanr(first[:8000], second[:8000]).statistic) < 0.05
    assert abs(stats.spearmanr(first[:7999], first[1:8000]).statistic) < 0.05
    np.testing.assert_array_equal(np.sort(first), np.sort(second))
    # Sixteen blocks of sixteen windows: not the same ones together in both epochs.
    assert set(first[:8000] // 500) != set(second[:8000] // 500)


def test_the_order_in_blocks_is_fixed_for_all_time():
    _, ids = Order(7, 1_000_000, block=1000).samples(np.array([0, 1, 999_999, 1_000_000, 2_000_000_001]))
    assert ids.tolist() == [493050, 373666, 963617, 155028, 4408]


def test_a_billion_billion_samples_cost_no_memory():
    _, ids = Order(0, 2**62, block=4096).samples(np.arange(2**61, 2**61 + 1000))
    assert len(set(ids.tolist())) == 1000
    assert len(set((ids // 4096).tolist())) <= 2 * WINDOW
    assert ids.min() >= 0
    assert ids.max() < 2**62


def test_a_block_of_a_negative_size_is_an_error():
    with pytest.raises(LorotError, match="a block of -1"):
        Order(0, 10, block=-1)
