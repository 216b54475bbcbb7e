"""What is drawn for each image, against what torchvision's own classes draw: their choices are recorded, not made."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from pipelines import augment
from pipelines.augment.auto_augment import POLICY
from pipelines.augment.levels import STANDARD, WIDE
from pipelines.augment.lighting import EIGENVALUES, EIGENVECTORS
from pipelines.augment.operations import Operation
from pipelines.errors import LorotError

SIZE = 160
IDS = np.arange(6000)
NAMES = {
    "Identity": Operation.NOTHING,
    "ShearX": Operation.SHEAR_X,
    "ShearY": Operation.SHEAR_Y,
    "TranslateX": Operation.TRANSLATE_X,
    "TranslateY": Operation.TRANSLATE_Y,
    "Rotate": Operation.ROTATE,
    "Brightness": Operation.BRIGHTNESS,
    "Color": Operation.SATURATION,
    "Contrast": Operation.CONTRAST,
    "Sharpness": Operation.SHARPNESS,
    "Posterize": Operation.POSTERIZE,
    "Solarize": Operation.SOLARIZE,
    "AutoContrast": Operation.AUTO_CONTRAST,
    "Equalize": Operation.EQUALIZE,
    "Invert": Operation.INVERT,
}
FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")


def amount_of(name, magnitude):
    """What torchvision hands to its functional transform."""
    if name in FACTORS:
        return 1.0 + magnitude
    if name.startswith("Translate"):
        return float(int(magnitude))
    return 255 * magnitude if name == "Solarize" else magnitude


def theirs(kind, count, **options):
    """`count` images' outcomes ((operation, amount), ...) of torchvision's class `kind`."""
    seen = []

    class Recording(kind):
        def _apply_image_or_video_transform(self, image, transform_id, magnitude, interpolation, fill):
            seen[-1].append((NAMES[transform_id], round(amount_of(transform_id, magnitude), 4)))
            return image

    torch.manual_seed(0)
    transform, image = Recording(**options), torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    for _ in range(count):
        seen.append([])
        transform(image)
    return [tuple(each) for each in seen]


def ours(name, count, **options):
    codes, amounts = augment.load(name, **options).sample(0, 0, np.arange(count), SIZE)
    rows = zip(codes.tolist(), amounts[:, :, 0].tolist(), strict=True)
    return [tuple((code, round(amount, 4)) for code, amount in zip(*row, strict=True)) for row in rows]


def assert_alike(first, second):
    """Two lists of outcomes: the same ones, equally often."""
    counts = Counter(first), Counter(second)
    outcomes = sorted(set(counts[0]) | set(counts[1]), key=str)
    table = np.array([[count[outcome] for outcome in outcomes] for count in counts])
    common = table.sum(axis=0) >= 30
    table = np.column_stack([table[:, common], table[:, ~common].sum(axis=1)])
    assert stats.chi2_contingency(table[:, table.any(axis=0)]).pvalue > 1e-3


@pytest.mark.parametrize("options", [{}, {"num_ops": 1, "magnitude": 6, "num_magnitude_bins": 11}])
def test_rand_augment_is_distributed_as_torchvisions(options):
    drawn, expected = ours("rand_augment", 6000, **options), theirs(v2.RandAugment, 3000, **options)
    assert {each for row in drawn for each in row} == {each for row in expected for each in row}
    for place in range(options.get("num_ops", 2)):
        assert_alike([row[place] for row in drawn], [row[place] for row in expected])


def test_the_two_operations_of_rand_augment_are_independent():
    codes, _ = augment.load("rand_augment").sample(0, 0, np.arange(40_000), SIZE)
    pairs = np.zeros((Operation.ERASE, Operation.ERASE))
    np.add.at(pairs, tuple(codes.T), 1)
    seen = pairs[pairs.any(axis=1)][:, pairs.any(axis=0)]
    assert seen.shape == (14, 14)
    assert stats.chi2_contingency(seen).pvalue > 1e-3


def test_auto_augment_is_distributed_as_torchvisions():
    drawn = [tuple(each for each in row if each[0]) for row in ours("auto_augment", 20_000)]
    assert_alike(drawn, theirs(v2.AutoAugment, 6000))
    first, second = augment.load("auto_augment").slots
    assert {code for row in ours("auto_augment", 2000) for code, _ in row} <= {0, *first, *second}


def test_auto_augments_pairs_are_torchvisions():
    pairs = v2.AutoAugment()._policies
    assert [[(NAMES[name], share, level or 0) for name, share, level in pair] for pair in pairs] == [
        list(pair) for pair in POLICY
    ]


def test_trivial_augment_is_distributed_as_torchvisions():
    drawn, expected = ours("trivial_augment", 30_000), theirs(v2.TrivialAugmentWide, 6000)
    assert_alike([row[0] for row in drawn], [row[0] for row in expected])
    assert {row[0] for row in expected} <= {row[0] for row in drawn}
    codes = [row[0][0] for row in drawn]
    assert stats.chisquare(list(Counter(codes).values())).pvalue > 1e-3
    assert len(set(codes)) == 14


@pytest.mark.parametrize(
    ("space", "kind"), [(STANDARD, v2.RandAugment), (STANDARD, v2.AutoAugment), (WIDE, v2.TrivialAugmentWide)]
)
@pytest.mark.parametrize("bins", [2, 10, 11, 31])
def test_every_level_is_torchvisions_to_the_last_pixel_and_bit(space, kind, bins):
    for name, (levels, _) in kind._AUGMENTATION_SPACE.items():
        for size in (32, 128, 160, 224, 331) if levels(bins, 224, 224) is not None else ():
            expected = [amount_of(name, float(level)) for level in levels(bins, size, size)]
            table = space.table(NAMES[name], bins, size)
            drawn = 1.0 + table.astype(np.float64) if name in FACTORS else table
            if name in ("TranslateX", "TranslateY", "Posterize"):
                assert drawn.tolist() == expected
            else:
                np.testing.assert_allclose(drawn, expected, rtol=3e-7, atol=1e-9)


def test_color_jitter_is_distributed_as_torchvisions():
    reach = {"brightness": 0.4, "contrast": 1.5, "saturation": 0.3, "hue": 0.2}
    codes, amounts = augment.load("color_jitter", **reach).sample(0, 0, IDS, SIZE)
    torch.manual_seed(0)
    jitter = v2.ColorJitter(**reach)
    drawn = [jitter.make_params([]) for _ in range(3000)]
    kinds = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.SATURATION, Operation.HUE)
    orders = [tuple(int(kinds[place]) for place in params["fn_idx"]) for params in drawn]
    assert_alike([tuple(row) for row in codes.tolist()], orders)
    for kind, name in zip(kinds, ("brightness", "contrast", "saturation", "hue"), strict=True):
        values = amounts[:, :, 0][codes == kind]
        assert len(values) == len(IDS)
        assert stats.ks_2samp(values, [d[f"{name}_factor"] for d in drawn]).pvalue > 1e-3


def test_color_jitter_leaves_out_what_has_no_reach():
    jitter = augment.load("color_jitter", brightness=0.0, hue=0.1)
    codes, _ = jitter.sample(0, 0, IDS, SIZE)
    wanted = {Operation.CONTRAST, Operation.SATURATION, Operation.HUE}
    assert jitter.slots == (wanted,) * 3
    assert {frozenset(row) for row in codes.tolist()} == {frozenset(wanted)}


def test_lighting_moves_along_the_components_by_normal_numbers():
    _, amounts = augment.load("lighting", std=0.2).sample(0, 0, IDS, SIZE)
    # The published vectors are orthonormal to three digits, so that their transpose undoes them.
    parts = amounts[:, 0, :3] / 255 @ EIGENVECTORS / EIGENVALUES / 0.2
    for part in parts.T:
        assert stats.kstest(part, stats.norm.cdf).pvalue > 1e-3
    correlation = np.corrcoef(parts.T) - np.eye(3)
    assert abs(correlation).max() < 0.08


@pytest.mark.parametrize("options", [{}, {"p": 1.0, "scale": (0.3, 0.9), "ratio": (0.5, 4.0)}])
def test_random_erasing_is_distributed_as_torchvisions(options):
    codes, amounts = augment.load("random_erasing", **options).sample(0, 0, IDS, SIZE)
    erased = codes[:, 0] == Operation.ERASE
    torch.manual_seed(0)
    erasing = v2.RandomErasing(**options)
    drawn = [erasing.make_params([torch.zeros(3, SIZE, SIZE)]) for _ in range(3000)]
    given_up = np.mean([params["v"] is None for params in drawn])
    assert abs(erased.mean() - options.get("p", 0.5) * (1 - given_up)) < 0.03
    expected = np.array([[params[key] for key in "ijhw"] for params in drawn if params["v"] is not None])
    for ours_, theirs_ in zip(amounts[erased, 0].T, expected.T, strict=True):
        assert stats.ks_2samp(ours_, theirs_).pvalue > 1e-3
    y, x, height, width = amounts[erased, 0].T
    assert (y + height <= SIZE).all()
    assert (x + width <= SIZE).all()
    assert not amounts[~erased].any()


@pytest.mark.parametrize("name", augment.available())
def test_every_augmentation_draws_for_a_sample_whatever_its_batch(name):
    augmentation = augment.load(name)
    epochs = np.arange(40) % 3
    codes, amounts = augmentation.sample(5, epochs, IDS[:40], SIZE)
    assert codes.shape == (40, len(augmentation.slots))
    assert amounts.shape == (*codes.shape, 4)
    assert (codes.dtype, amounts.dtype) == (np.int64, np.float32)
    backwards = augmentation.sample(5, epochs[::-1], IDS[:40][::-1], SIZE)
    for row in range(40):
        alone = augmentation.sample(5, int(epochs[row]), IDS[row : row + 1], SIZE)
        for together, single, reverse in zip((codes, amounts), alone, backwards, strict=True):
            np.testing.assert_array_equal(together[row], single[0])
            np.testing.assert_array_equal(together[row], reverse[39 - row])


@pytest.mark.parametrize("name", augment.available())
def test_every_augmentation_is_new_in_another_epoch_and_under_another_seed(name):
    sample = augment.load(name).sample
    first = sample(0, 0, IDS, SIZE)
    for other in (sample(0, 1, IDS, SIZE), sample(1, 0, IDS, SIZE)):
        alike = (first[0] == other[0]).all(axis=1) & (first[1] == other[1]).all(axis=(1, 2))
        assert alike.mean() < 0.35


@pytest.mark.parametrize("name", augment.available())
def test_a_slot_holds_what_it_says_or_nothing(name):
    augmentation = augment.load(name)
    codes, _ = augmentation.sample(0, 0, np.arange(20_000), SIZE)
    for column, allowed in zip(codes.T, augmentation.slots, strict=True):
        assert set(column) | {Operation.NOTHING} == allowed | {Operation.NOTHING}


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("randaugment", {}, "rand_augment"),
        ("operations", {}, "there are auto_augment"),
        ("rand_augment", {"strength": 3}, "num_ops, magnitude"),
        ("rand_augment", {"num_ops": 0}, "1 or more"),
        ("rand_augment", {"num_ops": "two"}, "'two' is not of the kind of 2"),
        ("rand_augment", {"magnitude": 31}, "within 0 and 30"),
        ("rand_augment", {"num_magnitude_bins": 1}, "2 or more"),
        ("trivial_augment", {"num_magnitude_bins": 1}, "2 or more"),
        ("auto_augment", {"policy": "cifar10"}, "imagenet"),
        ("color_jitter", {"hue": 0.6}, "0 to 0.5"),
        ("color_jitter", {"brightness": -0.1}, "0 or more"),
        ("color_jitter", {"brightness": 0, "contrast": 0, "saturation": 0}, "changes nothing"),
        ("lighting", {"std": 0}, "more than 0"),
        ("random_erasing", {"p": 0}, "above 0"),
        ("random_erasing", {"scale": [0.5, 0.1]}, "from <= to"),
        ("random_erasing", {"scale": 0.5}, "not of the kind"),
        ("random_erasing", {"ratio": [0, 1]}, "0 < from"),
    ],
)
def test_a_wrong_augmentation_or_option_says_what_there_is(name, options, hint):
    with pytest.raises(LorotError, match=hint):
        augment.load(name, **options)
