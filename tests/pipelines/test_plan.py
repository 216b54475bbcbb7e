import hashlib

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from pipelines import augment, pretext
from pipelines.augment.operations import Operation
from pipelines.errors import LorotError
from pipelines.plan import View, eval_plan, take, train_plan

TASK = pretext.load("none")


def plan_of(view, count=2000, height=96, width=96, seed=0, epoch=0):
    ids = np.arange(count)
    sizes = np.full(count, height), np.full(count, width)
    return train_plan(view, TASK, seed, np.full(count, epoch), ids, *sizes)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (120, 80), (50, 300)])
def test_random_windows_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(64, scale=(0.2, 1.0))
    drawn = [crop.make_params([torch.zeros(3, height, width)]) for _ in range(2000)]
    expected = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    windows = plan_of(View(size=64, scale=(0.2, 1.0)), height=height, width=width).windows
    for ours, theirs in zip(windows.T, expected.T, strict=True):
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
    areas = [(w[:, 2] * w[:, 3]) for w in (windows, expected)]
    assert stats.ks_2samp(*areas).pvalue > 1e-3


def test_a_tall_window_is_as_likely_as_a_wide_one():
    view = View(size=64, scale=(0.05, 0.1), ratio=(1 / 4, 4.0))
    windows = plan_of(view, count=5000, height=1000, width=1000).windows
    drawn = np.log(windows[:, 3] / windows[:, 2])
    assert stats.kstest(drawn, stats.uniform(-np.log(4), 2 * np.log(4)).cdf).pvalue > 1e-3


@pytest.mark.parametrize("crop", ["random_resized", "whole"])
@pytest.mark.parametrize(("height", "width"), [(96, 96), (1, 1), (3, 500), (500, 3)])
def test_windows_are_inside_the_image_and_not_empty(crop, height, width):
    y, x, tall, wide = plan_of(View(size=64, crop=crop), height=height, width=width).windows.T
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (tall >= 1).all()
    assert (wide >= 1).all()
    assert (y + tall <= height).all()
    assert (x + wide <= width).all()


@pytest.mark.parametrize(("height", "width", "window"), [(10, 400, [0, 193, 10, 13]), (400, 10, [193, 0, 13, 10])])
def test_an_image_too_narrow_for_any_try_gives_its_centre(height, width, window):
    windows = plan_of(View(size=64, scale=(0.9, 1.0)), count=20, height=height, width=width).windows
    assert (windows == window).all()


def test_a_padded_window_reaches_every_offset_equally_often():
    windows = plan_of(View(size=32, crop="pad", padding=4), count=20_000, height=32, width=32).windows
    assert (windows[:, 2:] == 32).all()
    for offsets in windows[:, :2].T:
        assert stats.chisquare(np.bincount(offsets + 4, minlength=9)).pvalue > 1e-3
        assert len(np.bincount(offsets + 4)) == 9


def test_half_of_the_images_are_mirrored_or_none():
    assert 0.46 < plan_of(View(size=64)).flips.mean() < 0.54
    assert not plan_of(View(size=64, flip=False)).flips.any()


def test_another_epoch_and_another_seed_are_other_windows():
    first, epoch, seed = plan_of(View(size=64)), plan_of(View(size=64), epoch=1), plan_of(View(size=64), seed=1)
    for other in (epoch, seed):
        assert (first.windows == other.windows).all(axis=1).mean() < 0.01
        assert 0.4 < (first.flips == other.flips).mean() < 0.6


def test_a_samples_plan_does_not_depend_on_its_batch():
    view, task = View(size=64), pretext.load("lorot_i")
    generator = np.random.default_rng(0)
    ids, epochs = generator.integers(0, 1000, 30), generator.integers(0, 5, 30)
    heights, widths = generator.integers(20, 200, (2, 30))
    together = train_plan(view, task, 1, epochs, ids, heights, widths)
    for row in range(30):
        one = slice(row, row + 1)
        alone = train_plan(view, task, 1, epochs[one], ids[one], heights[one], widths[one])
        assert take(together, row).size == 64
        for name, value in vars(take(together, row)).items():
            np.testing.assert_array_equal(value, getattr(alone, name))


def test_evaluation_takes_the_centre_square_as_torchvision_cuts_it():
    height, width = 100, 141
    numbers = torch.arange(height * width).reshape(1, height, width)
    centre = v2.CenterCrop(80)(numbers)
    (window,) = eval_plan(
        View(size=64, eval_crop=0.8), np.array([0]), np.array([height]), np.array([width]), np.array([True])
    ).windows
    y, x, tall, wide = window
    assert torch.equal(numbers[:, y : y + tall, x : x + wide], centre)


@pytest.mark.parametrize("crop", ["whole", "pad"])
def test_evaluation_takes_the_whole_image_where_training_does(crop):
    plan = eval_plan(View(size=64, crop=crop), np.arange(2), np.array([30, 50]), np.array([40, 60]), np.ones(2, bool))
    assert plan.windows.tolist() == [[0, 0, 30, 40], [0, 0, 50, 60]]


def test_evaluation_neither_mirrors_nor_turns():
    plan = eval_plan(View(size=64), np.arange(9), np.full(9, 80), np.full(9, 80), np.ones(9, bool))
    assert not plan.flips.any()
    assert not plan.turns.any()
    assert (plan.boxes == [0, 0, 64]).all()


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [({"crop": "middle"}, "whole"), ({"scale": (0, 1)}, "0 < from"), ({"ratio": (2, 1)}, "from <= to")],
)
def test_a_wrong_view_says_what_would_work(wrong, hint):
    with pytest.raises(LorotError, match=hint):
        View(size=64, **wrong)


EVERYTHING = tuple(
    augment.load(name) for name in sorted(augment.available(), key=lambda name: (name == "random_erasing", name))
)


def test_what_was_drawn_before_there_were_augmentations_is_drawn_still():
    ids = np.arange(64) * 7919
    digest = hashlib.sha256()
    for crop in ("random_resized", "pad", "whole"):
        for name in ("lorot_e", "lorot_i", "none", "rotation"):
            task, sizes, before = pretext.load(name), (40 + ids % 97, 50 + ids % 83), b""
            for view in (View(size=64, crop=crop), View(size=64, crop=crop, augment=EVERYTHING)):
                plan = train_plan(view, task, 3, np.arange(64) % 5, ids, *sizes, step=2)
                rows = (plan.windows, plan.flips, plan.boxes, plan.turns, plan.pretext_labels)
                drawn = b"".join(np.ascontiguousarray(row).tobytes() for row in rows)
                if view.augment:
                    assert drawn == before
                before = drawn
            digest.update(drawn)
    assert digest.hexdigest().startswith("e0389109971e0f40")


def test_the_operations_of_all_augmentations_stand_in_a_row():
    plan = plan_of(View(size=64, augment=EVERYTHING), count=50)
    ops = [augmentation.sample(0, plan.epochs, plan.ids, 64) for augmentation in EVERYTHING]
    np.testing.assert_array_equal(plan.ops, np.concatenate([codes for codes, _ in ops], axis=1))
    np.testing.assert_array_equal(plan.amounts, np.concatenate([amounts for _, amounts in ops], axis=1))
    assert plan.ops.shape[1] == len(View(size=64, augment=EVERYTHING).slots) == 2 + 3 + 1 + 2 + 1 + 1


def test_without_augmentations_and_in_evaluation_there_are_no_operations():
    view = View(size=64, augment=EVERYTHING)
    evaluated = eval_plan(view, np.arange(9), np.full(9, 80), np.full(9, 80), np.ones(9, bool))
    for plan in (plan_of(View(size=64), count=9), evaluated):
        assert plan.ops.shape == (9, 0)
        assert plan.amounts.shape == (9, 0, 4)


def test_evaluation_has_a_size_of_its_own():
    view = View(size=64, eval_size=96)
    evaluated = eval_plan(view, np.arange(2), np.full(2, 200), np.full(2, 100), np.ones(2, bool))
    assert evaluated.size == 96
    assert (evaluated.boxes == [0, 0, 96]).all()
    assert evaluated.windows.tolist() == [[56, 6, 88, 88]] * 2
    assert plan_of(view, count=2).size == 64


def test_what_acts_after_normalisation_must_be_last():
    erasing, jitter = augment.load("random_erasing"), augment.load("color_jitter")
    assert View(size=64, augment=(jitter, erasing)).slots[-1] == {Operation.ERASE}
    with pytest.raises(LorotError, match="'random_erasing' acts after normalisation and must be the last"):
        View(size=64, augment=(erasing, jitter))


def test_the_same_augmentation_twice_would_draw_the_same_and_is_refused():
    twice = (augment.load("rand_augment"), augment.load("rand_augment", magnitude=3))
    with pytest.raises(LorotError, match="'rand_augment' stands twice"):
        View(size=64, augment=twice)


class Drawn:
    """A pretext task, or an augmentation that erases, with one given rectangle."""

    num_labels = 4
    slots = (frozenset([Operation.ERASE]),)

    def __init__(self, rectangle):
        self.rectangle = rectangle

    def sample(self, seed, epochs, ids, size, *, step=0):
        rows = np.tile(np.array(self.rectangle), (len(ids), 1))
        if rows.shape[1] == 3:
            return rows, np.full(len(ids), -7), np.zeros(len(ids), np.int64)
        return np.full((len(ids), 1), Operation.ERASE), rows[:, None].astype(np.float32)


def drawn_plan(box=(0, 0, 64), rectangle=(0, 0, 64, 64), **sizes):
    sides = {"heights": np.full(3, 70), "widths": np.full(3, 70)} | sizes
    view = View(size=64, augment=(Drawn(rectangle),))
    return train_plan(view, Drawn(box), 0, np.zeros(3, np.int64), np.arange(3), **sides)


def test_boxes_and_rectangles_that_fill_the_input_are_planned_with_any_turns():
    assert (drawn_plan().turns == -7).all()
    drawn_plan((63, 63, 1), (63.0, 0.0, 1.0, 64.0))


@pytest.mark.parametrize("box", [(-1, 0, 9), (0, -1, 9), (0, 0, 0), (1, 0, 64), (0, 1, 64), (2**63 - 1, 0, 2)])
def test_a_box_that_reaches_out_of_the_input_is_refused_with_its_tasks_name(box):
    with pytest.raises(LorotError, match=r"a box of pretext task 'test_plan'.*does not lie inside 64 x 64"):
        drawn_plan(box)


@pytest.mark.parametrize("rectangle", [(-1, 0, 9, 9), (0, 60, 9, 5), (0, 0, 65, 9), (0, 0, 9, 0), (np.nan, 0, 9, 9)])
def test_a_rectangle_that_reaches_out_of_the_input_is_refused_with_its_augmentations_name(rectangle):
    with pytest.raises(LorotError, match=r"a rectangle of augmentation 'test_plan'.*does not lie inside 64 x 64"):
        drawn_plan(rectangle=rectangle)


@pytest.mark.parametrize("crop", ["random_resized", "whole"])
def test_a_window_of_an_image_without_pixels_is_refused(crop):
    ids, nothing = np.arange(2), np.zeros(2, np.int64)
    with pytest.raises(LorotError, match=f"a window of crop '{crop}'"):
        train_plan(View(size=64, crop=crop), TASK, 0, nothing, ids, np.array([9, 0]), np.array([9, 9]))
