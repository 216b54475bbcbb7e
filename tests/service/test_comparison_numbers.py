"""Means, spreads, pairs and printed numbers of a comparison, against numpy, scipy and what the configurations say."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines import manifest
from pipelines.instance_columns import InstanceRows
from pipelines.manifest import Heading, Manifest, Rows
from service import config
from service.comparison import published, wording
from service.comparison.spread import Spread, paired, spread
from service.config import DetectionConfig
from service.importing import imagenet
from tests.service.compared_models import card

ROOT = Path(__file__).parents[2]
FRACTIONS = st.floats(0, 1, allow_subnormal=False)


@given(st.lists(FRACTIONS, min_size=2, max_size=12))
def test_a_spread_is_numpys_mean_and_sample_deviation(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert found.deviation is not None
    assert found.count == len(values)
    np.testing.assert_allclose(found.mean, np.mean(values), atol=1e-12)
    np.testing.assert_allclose(found.deviation, np.std(values, ddof=1), atol=1e-9)


def test_a_single_value_has_no_deviation_and_none_has_no_mean() -> None:
    assert spread([0.25]) == Spread(0.25, None, 1)
    assert spread([]) is None
    with pytest.raises(ValueError, match="finite"):
        spread([0.5, float("nan")])


@given(st.dictionaries(st.integers(0, 9), st.tuples(FRACTIONS, FRACTIONS), min_size=2))
def test_pairs_are_compared_as_scipys_paired_t_test_does(both: dict[int, tuple[float, float]]) -> None:
    ours, theirs = ({seed: values[side] for seed, values in both.items()} for side in (0, 1))
    # What has no partner is left out, on either side.
    found = paired(ours | {100: 0.9}, theirs | {200: 0.1})
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.seeds == tuple(sorted(both))
    a, b = (np.array([values[seed] for seed in found.seeds]) for values in (ours, theirs))
    np.testing.assert_allclose(found.mean, (a - b).mean(), atol=1e-12)
    assert found.num_above == int((a > b).sum())
    if np.ptp(a - b) > 1e-6:
        interval = stats.ttest_rel(a, b).confidence_interval(0.95)
        np.testing.assert_allclose((found.low, found.high), (interval.low, interval.high), rtol=1e-6, atol=1e-9)


def test_without_a_seed_in_common_there_is_no_pair_and_one_pair_has_no_interval() -> None:
    assert paired({0: 0.5}, {1: 0.5}) is None
    found = paired({0: 0.5, 1: 0.25}, {1: 0.5})
    assert found is not None
    assert (found.mean, found.deviation, found.low, found.seeds, found.num_above) == (-0.25, None, None, (1,), 0)


def test_numbers_are_worded_in_per_cent() -> None:
    assert wording.number(Spread(0.93214, 0.0041, 3)) == "93.21 ± 0.41"
    assert wording.number(Spread(0.5, None, 1)) == "50.00"
    assert wording.number(None) == wording.printed(None) == "-"
    assert wording.printed(33.8) == "33.8"
    found = paired({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.7})
    assert found is not None
    assert wording.difference(found) == "+0.00 [-127.06, +127.06], 1 of 2 above"


def test_printed_numbers_are_those_that_the_configurations_open_with() -> None:
    names = {
        "baseline": "Baseline",
        "rot_da": "Rot (DA)",
        "rot_mt": "Rot (MT)",
        "lorot_i": "LoRot-I",
        "lorot_e": "LoRot-E",
    }
    table = published.TABLES["classify"].values
    for stem, method in names.items():
        text = (ROOT / f"configs/train/imagenet-{stem}.yaml").read_text()
        told = re.search(r"([0-9.]+) % top-1, ([0-9.]+) % top-5", text)
        assert told is not None
        assert table[method] == {"val/top1": float(told[1]), "val/top5": float(told[2])}
    for job, network in (("detect", "retinanet"), ("segment", "solov2")):
        text = (ROOT / f"configs/downstream/coco-{network}.yaml").read_text()
        told = re.search(r"baseline ([0-9.]+), LoRot-I ([0-9.]+), LoRot-E ([0-9.]+) %", text)
        assert told is not None
        numbers = {method: values["AP"] for method, values in published.TABLES[job].values.items()}
        assert numbers == dict(zip(("Baseline", "LoRot-I", "LoRot-E"), map(float, told.groups()), strict=True))


def test_table_9_is_there_in_both_readings_with_the_same_numbers() -> None:
    cam, iou = (published.TABLES[f"wsol-{axis}"].values for axis in ("cam", "iou"))
    assert {method: list(row.values()) for method, row in cam.items()} == {
        method: list(row.values()) for method, row in iou.items()
    }
    assert cam["LoRot-E"]["cam/top1_loc@0.5"] == iou["LoRot-E"]["iou/top1_loc@0.5"] == 50.24
    assert cam["Baseline"]["cam/top1_loc@0.9"] == 1.91


PUBLISHED = card(
    "lorot_e",
    model={"name": "resnet50"},
    classes=imagenet.CLASSES,
    view={"size": 224},
    data="folder",
    training_view={"augment": [{"name": "color_jitter"}, {"name": "lighting"}]},
)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"classes": ("a", "b")}, "of 2 classes, not on ImageNet"),
        ({"model": {"name": "resnet18"}}, "resnet18, not ResNet-50"),
        ({"view": {"size": 160}}, "160 pixels, not 224"),
        ({"pretext_options": {"grid": 3}}, "in no table"),
        ({"objective": "parallel_task"}, "in no table"),
        ({"training_view": {"augment": [{"name": "rand_augment"}]}}, "trained with rand_augment"),
    ],
)
def test_a_model_that_differs_from_the_papers_is_told_apart(change: dict[str, object], told: str) -> None:
    assert published.differences(PUBLISHED) == ()
    (why,) = published.differences(dataclasses.replace(PUBLISHED, **change))  # type: ignore[arg-type]
    assert told in why


def test_options_that_are_the_default_anyway_make_no_other_method() -> None:
    assert published.method(dataclasses.replace(PUBLISHED, pretext_options={"grid": 2})) == "LoRot-E"
    assert published.method(card("none")) == "Baseline"
    assert published.method(card("none", objective="imported")) is None


def images(root: Path, ids: tuple[str, ...], count: int, name: str = "folder", objects: bool = False) -> Manifest:
    instances = None
    if objects:
        instances = InstanceRows(
            image_ids=np.arange(count),
            labels=np.zeros(0, np.int64),
            crowd=np.zeros(0, bool),
            areas=np.zeros(0),
            bboxes=np.zeros((0, 4)),
            segmentations=[],
        )
    sides = np.full(count, 64)
    boxes = np.zeros((0, 4), np.float32) if objects else None
    counts = np.zeros(count, np.int64) if objects else None
    rows = Rows(np.zeros(count, np.int64), sides, sides, ["x.jpg"] * count, counts, boxes, instances=instances)
    path = root / f"{name}-{count}-{len(ids)}.arrow"
    manifest.write(path, Heading(name, "val", ids, ids, "0" * 64, ""), rows)
    return Manifest.open(path, root)


def test_only_imagenets_whole_validation_set_is_the_printed_one(tmp_path: Path) -> None:
    assert published.other_images(images(tmp_path, imagenet.CLASSES, 50_000)) == ()
    (why,) = published.other_images(images(tmp_path, imagenet.CLASSES, 49_999))
    assert "49,999 images, not on the 50,000" in why
    (why,) = published.other_images(images(tmp_path, imagenet.CLASSES[:999], 50_000))
    assert "not on ImageNet" in why
    (why,) = published.other_images(images(tmp_path, imagenet.CLASSES[::-1], 50_000, name="reversed"))
    assert "measured on reversed" in why


def test_only_coco_2017_is_the_printed_data_of_detectors(tmp_path: Path) -> None:
    # https://github.com/cocodataset/cocoapi: 80 of the ids 1 to 90.
    assert (len(published.COCO_IDS), published.COCO_IDS[0], published.COCO_IDS[-1]) == (80, "1", "90")
    train = images(tmp_path, published.COCO_IDS, 118_287, "coco", objects=True)
    val = images(tmp_path, published.COCO_IDS, 5_000, "coco", objects=True)
    assert published.other_objects(train, val) == ()
    (why,) = published.other_objects(val, val)
    assert "COCO 2017 has 118,287 and 5,000" in why
    other = images(tmp_path, tuple(map(str, range(1, 81))), 5_000, "gapless", objects=True)
    (why,) = published.other_objects(train, other)
    assert "not on COCO's 80" in why


def test_a_detectors_recipe_is_the_shipped_one_with_any_seed_and_place() -> None:
    def job(*overrides: str) -> DetectionConfig:
        path = ROOT / "configs/downstream/coco-retinanet.yaml"
        found = config.load_any(path, ["model.backbone=models:/x/1", *overrides])
        assert isinstance(found, DetectionConfig)
        return found

    assert published.other_recipe(job("seed=4", "data.root=elsewhere", "workers=8", "name=mine")) == ()
    for change in ("optimizer.lr=0.02", "duration=24 epochs", "data.short_sides=[640]", "micro_batch=4"):
        (why,) = published.other_recipe(job(change))
        assert "coco-retinanet.yaml" in why
