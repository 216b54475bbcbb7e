"""COCO's average precision against pycocotools: crowds, gaps in category ids, empty images, several workers."""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as official
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipelines import datasets, run_lengths
from pipelines.manifest import Manifest
from service.downstream.coco_scores import KINDS, METRICS, Scorer
from service.errors import DataError
from tests.pipelines.coco_files import annotation, content_of, rewrite, write

SIZES = [(120, 150), (240, 260), (64, 90), (150, 150), (100, 220), (90, 90), (130, 60), (77, 133)]
# In which places pycocotools reports them.
OFFICIAL = dict(zip(METRICS, (0, 1, 2, 3, 4, 5, 6, 7, 8), strict=True))
Found = dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


def ellipse(height: int, width: int, box: list[float]) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    x, y, wide, tall = box
    return ((columns - x - wide / 2) / (wide / 2)) ** 2 + ((rows - y - tall / 2) / (tall / 2)) ** 2 <= 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Eight images: small to large objects of two of three classes, crowds in three of them, none in the last two."""
    root = tmp_path_factory.mktemp("coco")
    generator = np.random.default_rng(4)
    annotations = []
    for image, (height, width) in enumerate(SIZES[:6]):
        for number in range(6):
            share = (0.12, 0.3, 0.7)[number % 3]
            wide, tall = (float(side * share * generator.uniform(0.7, 1.2)) for side in (width, height))
            x, y = (float(generator.uniform(-2, side - 0.8 * own)) for side, own in ((width, wide), (height, tall)))
            box = [round(value, 2) for value in (x, y, wide, tall)]
            mask = ellipse(height, width, box)
            runs = run_lengths.encode(mask[None])[0].decode()
            crowd = int(number == 5 and image < 3)
            more: dict[str, Any] = {
                "segmentation": {"size": [height, width], "counts": runs},
                "area": int(mask.sum()),
                "iscrowd": crowd,
            }
            annotations.append(annotation(len(annotations) + 1, 10 * (image + 1), (2, 90)[number % 2], box, **more))
    path = write(root, content_of(SIZES, annotations), "val")
    return path, datasets.load("coco", root, "val")


def detections(manifest: Manifest) -> Found:
    """Objects moved a little, some with the wrong class, some twice, and some out of nowhere."""
    generator = np.random.default_rng(5)
    found: Found = {}
    assert manifest.instances is not None
    for row in range(len(manifest)):
        height, width = int(manifest.heights[row]), int(manifest.widths[row])
        own = manifest.instances.of(row)
        boxes = own.bboxes.copy()
        boxes = np.concatenate([boxes, boxes[::2], generator.uniform(5, 50, (3, 4))])
        boxes += generator.normal(0, 1.5, boxes.shape)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], 2)
        labels = np.concatenate([own.labels, own.labels[::2], generator.integers(0, 3, 3)])
        labels = np.where(generator.random(len(labels)) < 0.1, generator.integers(0, 3, len(labels)), labels)
        # Ties, too.
        scores = np.round(generator.random(len(labels)), 2)
        masks = np.stack([ellipse(height, width, box) for box in boxes.tolist()])
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        found[row] = corners, scores, labels, masks
    empty = len(manifest) - 1
    found[empty] = tuple(part[:0] for part in found[empty])  # type: ignore[assignment]
    return found


def give(scorer: Scorer, found: Found, rows: list[int]) -> Scorer:
    for row in rows:
        boxes, scores, labels, masks = (torch.from_numpy(part) for part in found[row])
        scorer.update(row, boxes, scores, labels, masks)
    return scorer


def by_pycocotools(path: Path, manifest: Manifest, found: Found, kind: str, rows: list[int]) -> dict[str, float]:
    assert manifest.instances is not None
    results = []
    for row in rows:
        image = int(manifest.instances.image_ids[row])
        for box, score, label, mask in zip(*found[row], strict=True):
            about = {"image_id": image, "category_id": int(manifest.class_ids[label]), "score": float(score)}
            left, top, right, bottom = box.tolist()
            if kind == "bbox":
                about["bbox"] = [left, top, right - left, bottom - top]
            else:
                about["segmentation"] = official.encode(np.asfortranarray(mask.astype(np.uint8)))
            results.append(about)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        evaluator = COCOeval(truth, truth.loadRes(results) if results else COCO(), kind)
        evaluator.params.imgIds = [int(manifest.instances.image_ids[row]) for row in rows]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return {name: float(evaluator.stats[place]) for name, place in OFFICIAL.items()}


def assert_equal(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert tuple(ours) == METRICS
    for name, value in theirs.items():
        assert math.isnan(ours[name]) if value < 0 else ours[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_pycocotools_own(data: tuple[Path, Manifest], kind: str) -> None:
    path, manifest = data
    found, rows = detections(manifest), list(range(len(manifest)))
    ours = give(Scorer(manifest, kind), found, rows).compute()
    assert 0.1 < ours["AP"] < 0.9
    assert not any(math.isnan(value) for value in ours.values())
    assert len(set(ours.values())) > 6
    assert_equal(ours, by_pycocotools(path, manifest, found, kind, rows))


@pytest.mark.parametrize("kind", KINDS)
def test_objects_without_area_in_their_image_count_as_pycocotools_counts_them(
    data: tuple[Path, Manifest], tmp_path: Path, kind: str
) -> None:
    content = json.loads(data[0].read_text())
    known = len(content["annotations"])
    odd: list[tuple[int, int, list[float], dict[str, Any]]] = [
        (10, 2, [20, 20, 0, 30], {}),
        (10, 90, [20, 20, 30, 0], {"area": 400}),
        (10, 2, [149.9999, 20, 30, 30], {}),
        (20, 90, [300, 10, 40, 40], {}),
        (20, 2, [-90, -90, 60, 60], {}),
        (20, 2, [10, 250, 60, -30], {}),
        (30, 90, [5, 5, -4, -4], {}),
        (40, 2, [0, 200, 100, 120], {"iscrowd": 1}),
        (50, 90, [400, 0, 12, 12], {}),
        # In an image without any other, of a class without any other.
        (70, 7, [-50, 0, 50, 50], {}),
    ]
    for image, category, box, more in odd:
        content["annotations"].append(annotation(len(content["annotations"]) + 1, image, category, box, **more))
    path = write(tmp_path, content, "val")
    manifest = datasets.load("coco", tmp_path, "val")
    assert manifest.instances is not None
    assert len(manifest.instances) == known + len(odd)
    rows = list(range(len(manifest)))
    for found in (detections(manifest), detections(data[1])):
        ours = give(Scorer(manifest, kind), found, rows).compute()
        assert 0.05 < ours["AP"] < give(Scorer(data[1], kind), detections(data[1]), rows).compute()["AP"]
        assert_equal(ours, by_pycocotools(path, manifest, found, kind, rows))


@pytest.mark.parametrize("kind", KINDS)
def test_only_images_that_were_given_count(data: tuple[Path, Manifest], kind: str) -> None:
    path, manifest = data
    found = detections(manifest)
    for rows in ([1, 4], [0], [0, 2, 6, 7]):
        ours = give(Scorer(manifest, kind), found, rows).compute()
        assert_equal(ours, by_pycocotools(path, manifest, found, kind, rows))


@pytest.mark.parametrize("kind", KINDS)
def test_workers_together_score_what_one_alone_does(data: tuple[Path, Manifest], kind: str) -> None:
    _, manifest = data
    found = detections(manifest)
    alone = give(Scorer(manifest, kind), found, list(range(8))).compute()
    workers = [give(Scorer(manifest, kind), found, rows) for rows in ([5, 0, 3], [], [7], [1, 2, 4, 6])]
    states = [worker.state() for worker in workers]
    assert all(state.dtype == torch.uint8 and state.ndim == 1 for state in states)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        together = Scorer(manifest, kind)
        for worker in order:
            together.merge(states[worker])
        assert len(together) == 8
        assert together.compute() == pytest.approx(alone, rel=0, abs=0, nan_ok=True)
    with pytest.raises(ValueError, match="given twice"):
        together.merge(states[0])


def test_nothing_found_is_worth_nothing_and_nothing_to_find_is_unknown(data: tuple[Path, Manifest]) -> None:
    _, manifest = data
    nothing = np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), np.zeros((0, 1, 1), bool)
    for kind in KINDS:
        scorer = Scorer(manifest, kind)
        with pytest.raises(ValueError, match="no image was given"):
            scorer.compute()
        for row in range(8):
            scorer.update(row, *nothing)
        assert scorer.compute()["AP"] == 0
        last = Scorer(manifest, kind)
        last.update(7, *nothing)
        assert all(math.isnan(value) for value in last.compute().values())


def test_the_right_answer_is_worth_everything(data: tuple[Path, Manifest]) -> None:
    _, manifest = data
    assert manifest.instances is not None
    boxes, masks = Scorer(manifest), Scorer(manifest, "segm")
    for row in range(8):
        own = manifest.instances.of(row)
        single = own.where(~own.crowd)
        corners = np.concatenate([single.bboxes[:, :2], single.bboxes[:, :2] + single.bboxes[:, 2:]], axis=1)
        boxes.update(row, corners, np.ones(len(single)), single.labels)
        # Run lengths are taken as they are.
        masks.update(row, corners, np.ones(len(single)), single.labels, list(single.segmentations))
    assert boxes.compute()["AP"] == pytest.approx(1)
    assert masks.compute()["AP"] == pytest.approx(1)


def test_masks_take_little_memory(data: tuple[Path, Manifest]) -> None:
    _, manifest = data
    found = detections(manifest)
    state = give(Scorer(manifest, "segm"), found, list(range(8))).state()
    assert len(state) < 0.02 * sum(part[3].nbytes for part in found.values()) + 20_000


def test_detections_that_do_not_fit_are_refused(data: tuple[Path, Manifest]) -> None:
    _, manifest = data
    scorer = Scorer(manifest, "segm")
    boxes, scores, labels, masks = detections(manifest)[0]
    for given, complaint in (
        ((0, boxes, scores, labels), "no masks"),
        ((0, boxes, scores[1:], labels, masks), "scores"),
        ((0, boxes, scores, labels, masks[1:]), "masks"),
        ((0, boxes, scores, labels, masks[:, 1:]), "an image of 120 x 150"),
        ((0, boxes, scores, labels + 3, masks), "of 3 classes"),
        ((0, boxes, scores * np.nan, labels, masks), "not finite"),
        ((0, boxes, scores, labels, [b"oo"] * len(masks)), "run lengths"),
        ((8, boxes[:0], scores[:0], labels[:0], []), "none of the 8"),
    ):
        with pytest.raises((ValueError, IndexError), match=complaint):
            scorer.update(*given)
    scorer.update(0, boxes, scores, labels, masks)
    with pytest.raises(ValueError, match="given twice"):
        scorer.update(0, boxes, scores, labels, masks)
    for state in (torch.zeros(0, dtype=torch.uint8), torch.arange(50, dtype=torch.uint8), scorer.state()[:-3]):
        with pytest.raises(ValueError, match="no state of a scorer"):
            Scorer(manifest, "segm").merge(state)


def test_data_without_objects_or_masks_cannot_be_scored(tmp_path: Path) -> None:
    content = content_of(SIZES[:1], [annotation(1, 10, 2, [5, 5, 20, 20])])
    del content["annotations"][0]["segmentation"]
    write(tmp_path, content)
    manifest = datasets.load("coco", tmp_path, "train")
    Scorer(manifest)
    with pytest.raises(DataError, match="has no segmentations"):
        Scorer(manifest, "segm")
    with pytest.raises(ValueError, match="there are bbox, segm"):
        Scorer(manifest, "boundary")
    content["annotations"] = []
    rewrite(tmp_path, content)
    Scorer(datasets.load("coco", tmp_path, "train"))
    drawn = datasets.load("demo", tmp_path / "demo", "val", val_count=10, size=48)
    with pytest.raises(DataError, match="has no objects to compare with"):
        Scorer(drawn)
