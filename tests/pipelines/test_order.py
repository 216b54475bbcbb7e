import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.errors import LorotError
from pipelines.order import Order, evaluation_batch, num_evaluation_batches, permute, positions


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 1000))
def test_an_epoch_is_a_permutation_at_any_length(length, seed, epoch):
    epochs, ids = Order(seed, length).samples(np.arange(epoch * length, (epoch + 1) * length))
    assert (epochs == epoch).all()
    assert sorted(ids) == list(range(length))


def test_all_orders_of_four_samples_are_equally_likely():
    places, epochs = np.tile(np.arange(4), 2400), np.repeat(np.arange(2400), 4)
    draws = permute(places, 4, 0, epochs, "order").reshape(2400, 4)
    counts = np.unique(draws, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_every_sample_is_equally_likely_at_every_place():
    length = 100
    _, ids = Order(5, length).samples(np.arange(400 * length))
    counts = np.zeros((length, length))
    np.add.at(counts, (np.arange(400 * length) % length, ids), 1)
    assert stats.chisquare(counts, axis=None).pvalue > 1e-3


def test_neighbours_and_epochs_are_unrelated():
    length = 10_007
    first, second = (permute(np.arange(length), length, 0, epoch, "order") for epoch in (0, 1))
    assert abs(stats.spearmanr(first, second).statistic) < 0.04
    assert abs(stats.spearmanr(first[:-1], first[1:]).statistic) < 0.04
    assert (first == second).sum() < 10


def test_the_order_is_fixed_for_all_time():
    _, ids = Order(7, 1000).samples(np.array([0, 1, 999, 1000, 2_000_000_001]))
    assert ids.tolist() == [61, 278, 391, 128, 754]


def test_a_batch_that_straddles_two_epochs_ends_one_and_begins_the_next():
    order = Order(1, 10)
    epochs, ids = order.samples(np.arange(8, 13))
    assert epochs.tolist() == [0, 0, 1, 1, 1]
    whole = order.samples(np.arange(20))[1]
    np.testing.assert_array_equal(ids, whole[8:13])


def test_a_billion_billion_samples_cost_no_memory():
    order = Order(0, 2**62)
    _, ids = order.samples(np.arange(2**61, 2**61 + 1000))
    assert len(set(ids.tolist())) == 1000
    assert ids.min() >= 0
    assert ids.max() < 2**62
    assert ids.std() > 2**59


def test_a_limit_keeps_the_same_samples_in_every_epoch():
    order = Order(3, 1000, limit=64)
    epochs = [set(order.samples(np.arange(64) + 64 * epoch)[1].tolist()) for epoch in range(3)]
    assert epochs[0] == epochs[1] == epochs[2] == set(order.members(np.arange(64)).tolist())
    assert len(epochs[0]) == 64
    assert max(epochs[0]) > 500
    assert epochs[0] != set(Order(4, 1000, limit=64).samples(np.arange(64))[1].tolist())


@pytest.mark.parametrize("limit", [0, -1, 11])
def test_a_limit_that_does_not_fit_is_an_error(limit):
    with pytest.raises(LorotError, match="use 1 to 10"):
        Order(0, 10, limit=limit)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_same_samples_are_forwarded_together_at_any_world_size(world_size):
    shares = [
        positions(7, index, rank, world_size, micro_batch=4, global_batch=32)
        for index in range(8 // world_size)
        for rank in range(world_size)
    ]
    np.testing.assert_array_equal(np.stack(shares), np.arange(7 * 32, 8 * 32).reshape(8, 4))


def test_a_batch_that_cannot_be_shared_is_an_error_that_names_one_that_can():
    with pytest.raises(LorotError, match="use 24"):
        positions(0, 0, 0, world_size=3, micro_batch=4, global_batch=32)


@given(st.integers(1, 200), st.integers(1, 17), st.integers(1, 5))
def test_evaluation_sees_every_sample_once_at_any_world_and_batch_size(length, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        for index in range(num_evaluation_batches(length, batch_size, world_size)):
            ids, valid = evaluation_batch(index, rank, world_size, batch_size, length)
            assert len(ids) == len(valid) == batch_size
            assert (ids >= 0).all()
            assert (ids < length).all()
            seen += ids[valid].tolist()
    assert sorted(seen) == list(range(length))


def test_evaluation_deals_its_batches_out_to_the_ranks_in_turn():
    dealt = [evaluation_batch(index, rank, 2, 3, 14)[0].tolist() for index in range(2) for rank in range(2)]
    assert dealt == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_evaluation_makes_no_more_batches_than_needed():
    assert [num_evaluation_batches(length, 4, 2) for length in (1, 8, 9, 16, 17)] == [1, 1, 2, 2, 3]
