import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.randomness import integers, philox, scale_to_integers, uniform

WORD = st.integers(0, 2**32 - 1)


def scalar_philox(counter, key):
    """Philox4x32-10 in plain integers, written from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    assert philox(np.array(counter, np.uint64)[:, None], np.array(key, np.uint64))[:, 0].tolist() == answer


@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=5), st.tuples(WORD, WORD))
def test_the_vectorised_philox_equals_the_scalar_one(counters, key):
    words = philox(np.array(counters, np.uint64).T, np.array(key, np.uint64))
    assert words.T.tolist() == [scalar_philox(counter, key) for counter in counters]


def test_a_sample_draws_the_same_in_any_company():
    ids = np.array([5, 2**40 + 5, 77, 5])
    together = uniform(3, np.array([0, 0, 9, 1]), ids, "flip", num=3)
    alone = [uniform(3, epoch, np.array([i]), "flip", num=3)[0] for epoch, i in zip([0, 0, 9, 1], ids, strict=True)]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_the_first_numbers_do_not_depend_on_how_many_are_drawn():
    ids = np.arange(10)
    np.testing.assert_array_equal(uniform(0, 0, ids, "a", num=2), uniform(0, 0, ids, "a", num=7)[:, :2])


def test_seed_epoch_id_and_stream_each_change_everything():
    ids = np.arange(1000)
    drawn = [
        uniform(0, 0, ids, "a"),
        uniform(1, 0, ids, "a"),
        uniform(0, 1, ids, "a"),
        uniform(0, 0, ids + 2**32, "a"),
        uniform(0, 0, ids, "b"),
    ]
    correlation = np.corrcoef(np.hstack(drawn).T) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 0.15


def test_draws_are_uniform_and_columns_unrelated():
    drawn = uniform(11, 4, np.arange(20_000), "crop", num=5)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert all(stats.kstest(column, "uniform").pvalue > 1e-3 for column in drawn.T)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(5)).max() < 0.04


def test_integers_reach_both_ends_equally_often():
    drawn = integers(0, 0, np.arange(70_000), "turns", -3, 3)
    counts = np.bincount(drawn + 3, minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts).pvalue > 1e-3


def test_bounds_may_differ_by_sample():
    high = np.arange(1000) % 7
    drawn = integers(0, 0, np.arange(1000), "position", 0, high)
    assert (drawn >= 0).all()
    assert (drawn <= high).all()
    assert (drawn[high == 0] == 0).all()


def test_the_greatest_number_below_one_stays_within_bounds():
    almost = np.array([1 - 2.0**-53])
    assert scale_to_integers(almost, 0, 9).tolist() == [9]
    assert scale_to_integers(almost, 0, 2**60).tolist()[0] <= 2**60
