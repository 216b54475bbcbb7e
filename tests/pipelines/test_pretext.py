import importlib

import numpy as np
import pytest
from scipy import stats

from pipelines import pretext
from pipelines.errors import LorotError

IDS = np.arange(4000)
ALL = [(name, {}) for name in pretext.available()] + [("lorot_e", {"grid": 4}), ("lorot_i", {"protocol": "official"})]


def test_there_are_the_tasks_of_the_papers_first_tables():
    assert set(pretext.available()) >= {"none", "rotation", "lorot_i", "lorot_e"}


@pytest.mark.parametrize(("name", "options"), ALL)
def test_every_task_samples_square_boxes_inside_the_image(name, options):
    task = pretext.load(name, **options)
    boxes, turns, labels = task.sample(0, 0, IDS, 64)
    assert boxes.shape == (len(IDS), 3)
    assert boxes.dtype == turns.dtype == labels.dtype == np.int64
    assert boxes[:, :2].min() >= 0
    assert boxes[:, 2].min() >= 1
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 64
    assert set(turns) <= {0, 1, 2, 3}
    assert set(labels) == set(range(max(1, task.num_labels)))


@pytest.mark.parametrize(("name", "options"), ALL)
def test_every_task_draws_for_a_sample_whatever_its_batch(name, options):
    task = pretext.load(name, **options)
    epochs = np.arange(50) % 3
    together = task.sample(5, epochs, IDS[:50], 64, step=9)
    for row in range(50):
        alone = task.sample(5, int(epochs[row]), IDS[row : row + 1], 64, step=9)
        assert all((a[row] == b[0]).all() for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("name", pretext.available())
def test_every_module_offers_its_task_at_the_defaults(name):
    module, task = importlib.import_module(f"pipelines.pretext.{name}"), pretext.load(name)
    assert module.num_labels == task.num_labels
    ours, theirs = module.sample(0, 0, IDS, 64), task.sample(0, 0, IDS, 64)
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["rotation", "lorot_i", "lorot_e"])
def test_turns_are_equally_likely_and_new_in_every_epoch(name):
    task = pretext.load(name)
    _, turns, _ = task.sample(0, 0, IDS, 64)
    _, later, _ = task.sample(0, 1, IDS, 64)
    assert stats.chisquare(np.bincount(turns, minlength=4)).pvalue > 1e-3
    assert 0.2 < (turns == later).mean() < 0.3


def test_none_has_nothing_to_predict():
    boxes, turns, labels = pretext.load("none").sample(0, 0, IDS, 64)
    assert pretext.load("none").num_labels == 0
    assert not turns.any()
    assert not labels.any()
    assert (boxes == [0, 0, 64]).all()


def test_rotation_turns_the_whole_image():
    boxes, turns, labels = pretext.load("rotation").sample(0, 0, IDS, 64)
    assert (boxes == [0, 0, 64]).all()
    assert (labels == turns).all()


def test_lorot_e_numbers_cells_row_by_row_and_turns_within_them():
    boxes, turns, labels = pretext.load("lorot_e").sample(0, 0, IDS, 64)
    corners = {0: [0, 0, 32], 1: [0, 32, 32], 2: [32, 0, 32], 3: [32, 32, 32]}
    for box, turn, label in zip(boxes, turns, labels, strict=True):
        cell, rest = divmod(int(label), 4)
        assert box.tolist() == corners[cell]
        assert rest == turn


def test_lorot_e_labels_are_equally_likely():
    _, _, labels = pretext.load("lorot_e").sample(0, 0, np.arange(20_000), 64)
    assert stats.chisquare(np.bincount(labels, minlength=16)).pvalue > 1e-3


def test_lorot_e_of_three_has_36_labels():
    task = pretext.load("lorot_e", grid=3)
    boxes, _, labels = task.sample(0, 0, IDS, 96)
    assert task.num_labels == 36
    assert boxes[labels // 4 == 5][0].tolist() == [32, 64, 32]


def test_a_grid_that_does_not_divide_the_image_is_an_error_that_names_a_size():
    with pytest.raises(LorotError, match="such as 63"):
        pretext.load("lorot_e", grid=3).sample(0, 0, IDS, 64)


def test_lorot_i_keeps_to_equation_4_with_both_bounds():
    boxes, turns, labels = pretext.load("lorot_i").sample(0, 0, np.arange(50_000), 16)
    y, x, side = boxes.T
    assert (labels == turns).all()
    assert stats.chisquare(np.bincount(side, minlength=9)[2:]).pvalue > 1e-3
    assert set(side) == set(range(2, 9))
    for length in range(2, 9):
        for place in (y, x):
            counts = np.bincount(place[side == length])
            assert len(counts) == 16 - length + 1
            assert stats.chisquare(counts).pvalue > 1e-4


def test_lorot_i_as_published_draws_one_box_a_step_and_a_turn_an_image():
    task = pretext.load("lorot_i", protocol="official")
    drawn = [task.sample(0, 0, IDS[:200], 16, step=step)[0] for step in range(300)]
    assert all((boxes == boxes[0]).all() for boxes in drawn)
    assert len({tuple(boxes[0]) for boxes in drawn}) > 100
    assert set(task.sample(0, 0, IDS[:200], 16, step=1)[1]) == {0, 1, 2, 3}


def test_lorot_i_as_published_never_reaches_the_last_row_or_column():
    task = pretext.load("lorot_i", protocol="official")
    boxes = np.concatenate([task.sample(0, 0, IDS[:1], 16, step=step)[0] for step in range(500)])
    assert (boxes[:, :2] + boxes[:, 2:]).max() == 15
    assert set(boxes[:, 2]) == set(range(2, 9))


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("lorot", {}, "lorot_e"),
        ("lorot_e", {"cells": 3}, "grid"),
        ("lorot_e", {"grid": 0}, "1 cell"),
        ("lorot_i", {"protocol": "mine"}, "paper, official"),
    ],
)
def test_a_wrong_task_or_option_says_what_there_is(name, options, hint):
    with pytest.raises(LorotError, match=hint):
        pretext.load(name, **options)


def test_lorot_i_needs_room_for_a_box():
    with pytest.raises(LorotError, match="4 pixels"):
        pretext.load("lorot_i").sample(0, 0, IDS, 3)
