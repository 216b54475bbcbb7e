"""Images with objects through both renderings: torchvision's sizes and boxes, DALI against torch, order, resuming."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from pipelines import dali, datasets, instance_reference, instances, run_lengths
from pipelines.errors import DataError, LorotError
from pipelines.instance_columns import Objects
from pipelines.instance_plan import InstancePlan, moved_boxes, resized
from pipelines.instances import InstanceBatch, InstanceSource, InstanceView, open_eval, open_train
from pipelines.manifest import Manifest
from tests.pipelines.coco_files import annotation, content_of, rewrite, write

KINDS = ("dali", "torch")
VIEW = InstanceView(short_sides=(40, 56, 72), long_side=100)
COUNT, EMPTY = 17, 3


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """20 images of many sizes with 1 to 5 triangles each; the last three have none, and some have a crowd as well."""
    root = tmp_path_factory.mktemp("scenes")
    generator = np.random.default_rng(0)
    sizes = [(int(height), int(width)) for height, width in generator.integers(33, 120, (COUNT + EMPTY, 2))]
    annotations = []
    for image, (height, width) in enumerate(sizes[:COUNT]):
        for number in range(1 + image % 5):
            x, y = float(generator.uniform(-3, width - 9)), float(generator.uniform(-3, height - 9))
            wide, tall = float(generator.uniform(6, 40)), float(generator.uniform(6, 40))
            corners = [x, y, x + wide, y, x + wide / 2, y + tall]
            about: dict[str, Any] = {"segmentation": [corners], "iscrowd": int(number == 3)}
            box = [x, y, wide, tall]
            annotations.append(annotation(len(annotations) + 1, 10 * (image + 1), (2, 7, 90)[number % 3], box, **about))
    write(root, content_of(sizes, annotations))
    return datasets.load("coco", root, "train")


def source_of(manifest: Manifest, **options: Any) -> InstanceSource:
    return InstanceSource(manifest, **{"view": VIEW, "seed": 3, "with_masks": True} | options)


def train(kind: str, source: InstanceSource, start: int = 0, stop: int = 5, **options: Any) -> list[InstanceBatch]:
    given = {"global_batch": 4, "micro_batch": 4, "num_threads": 1} | options
    with open_train(kind, source, start_step=start, stop_step=stop, **given) as loader:
        return list(loader)


def assert_same(ours: list[InstanceBatch], theirs: list[InstanceBatch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(one[:5], other[:5], strict=True))
        for own, their in zip(one.targets, other.targets, strict=True):
            assert all(torch.equal(left, right) for left, right in zip(own, their, strict=True))


@pytest.mark.parametrize(("short", "long"), [(800, 1333), (480, 640), (7, 9)])
def test_sizes_are_those_of_torchvisions_detection_models(short: int, long: int) -> None:
    generator = np.random.default_rng(0)
    sizes = np.concatenate([generator.integers(1, 700, (150, 2)), [[427, 640], [333, 500], [1, 640], [612, 612]]])
    found = resized(sizes, np.full(len(sizes), short), long)
    transform = GeneralizedRCNNTransform(short, long, [0.0], [1.0])
    for (height, width), own in zip(sizes.tolist(), found.tolist(), strict=True):
        if min(height, width) * long < max(height, width):
            # torchvision fails on what would become less than a pixel.
            assert min(own) == 1
            continue
        image, _ = transform.resize(torch.zeros(1, height, width, dtype=torch.uint8).float(), None)
        assert list(image.shape[1:]) == own


@pytest.mark.parametrize("with_masks", [True, False])
def test_dali_gives_the_references_pixels_and_exactly_its_boxes_and_masks(scenes: Manifest, with_masks: bool) -> None:
    source = source_of(scenes, with_masks=with_masks)
    ours, theirs = (train(kind, source, stop=17) for kind in KINDS)
    std = torch.tensor(VIEW.std)[:, None, None] * 255
    looked = 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.images.shape == other.images.shape
        assert one.images.dtype == other.images.dtype == torch.float32
        for batch in (one, other):
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
        # The bounds of test_parity.
        difference = (one.images - other.images) * std
        assert difference.abs().mean() < 0.1
        assert difference.mean(dim=(0, 2, 3)).abs().max() < 0.1
        assert_same([one._replace(images=other.images)], [other])
        for target, (height, width) in zip(one.targets, one.sizes.tolist(), strict=True):
            count = len(target.labels)
            assert target.boxes.shape == (count, 4)
            assert target.boxes.dtype == torch.float32
            assert target.masks.shape == ((count, height, width) if with_masks else (0, 0, 0))
            assert target.masks.dtype == torch.uint8
            assert not target.crowd.any()
            assert target.boxes.numel() == 0 or target.boxes.min() >= 0
            looked += 1
    assert looked == 68


def test_masks_are_exact_whatever_the_sizes(scenes: Manifest) -> None:
    generator = np.random.default_rng(1)
    count = 250
    # Noise, so that one column or row that is not the nearest shows.
    source_sizes, sizes = generator.integers(1, 250, (2, count, 2))
    source_sizes[0], sizes[0] = (64, 90), (32, 45)
    objects = np.empty(count, object)
    for row, (height, width) in enumerate(source_sizes.tolist()):
        runs = tuple(run_lengths.encode(generator.random((1, height, width)) < 0.5))
        box = np.array([[0, 0, width, height]], np.float32)
        zeros = np.zeros(1)
        objects[row] = Objects(box, zeros.astype(int), zeros.astype(bool), zeros, box.astype(float), runs)
    ids, flips = np.arange(count), generator.random(count) < 0.5
    plan = InstancePlan(ids, ids, source_sizes, sizes, flips, np.ones(count, bool), objects, (256, 256))
    images = [np.zeros((height, width, 3), np.uint8) for height, width in source_sizes.tolist()]
    graph = dali.InstanceGraph(VIEW, encoded=False, flips=True, masks=True)
    rendered = []
    for renderer in (
        dali.Renderer(graph, device="cpu", batch_size=count, num_threads=1, depth=1),
        instance_reference.renderer(VIEW, with_masks=True),
    ):
        renderer.submit(renderer.prepare(images, plan))
        rendered.append(renderer.collect())
    different = [
        (old, new)
        for old, new, one, other in zip(source_sizes, sizes, rendered[0].masks, rendered[1].masks, strict=True)
        if not torch.equal(one, other)
    ]
    assert different == []
    assert all(torch.equal(one, other) for one, other in zip(rendered[0].boxes, rendered[1].boxes, strict=True))


def test_masks_lie_in_their_boxes(scenes: Manifest) -> None:
    for batch in train("dali", source_of(scenes), stop=9):
        for target in batch.targets:
            for mask, (left, top, right, bottom) in zip(target.masks, target.boxes.tolist(), strict=True):
                rows, columns = torch.nonzero(mask, as_tuple=True)
                if len(rows):
                    assert top - 2 <= rows.min()
                    assert rows.max() + 1 <= bottom + 2
                    assert left - 2 <= columns.min()
                    assert columns.max() + 1 <= right + 2


def test_flips_mirror_images_boxes_and_masks_together(scenes: Manifest) -> None:
    still, moving = (source_of(scenes, view=InstanceView((64,), 100, flip=flip)) for flip in (False, True))
    flipped = 0
    for one, other in zip(train("dali", still, stop=12), train("dali", moving, stop=12), strict=True):
        assert torch.equal(one.ids, other.ids)
        for row, (height, width) in enumerate(one.sizes.tolist()):
            plain, content = one.images[row, :, :height, :width], other.images[row, :, :height, :width]
            own, their = one.targets[row], other.targets[row]
            if torch.equal(plain, content):
                assert torch.equal(own.boxes, their.boxes)
                assert torch.equal(own.masks, their.masks)
                continue
            flipped += 1
            assert torch.equal(plain.flip(2), content)
            assert torch.equal(own.masks.flip(2), their.masks)
            left, top, right, bottom = own.boxes.T
            assert torch.equal(torch.stack([width - right, top, width - left, bottom], dim=1), their.boxes)
    assert 12 < flipped < 36


def test_contents_lie_in_the_corner_of_the_smallest_canvas_with_zeros_around(scenes: Manifest) -> None:
    view = InstanceView((40, 56, 72), 100, divisor=16)
    for kind in KINDS:
        for batch in train(kind, source_of(scenes, view=view)):
            most = batch.sizes.max(dim=0).values
            assert list(batch.images.shape[2:]) == [-(-int(side) // 16) * 16 for side in most]
            for image, (height, width) in zip(batch.images, batch.sizes.tolist(), strict=True):
                assert not image[:, height:].any()
                assert not image[:, :, width:].any()
                assert image[:, :height, :width].abs().mean() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_workers_gets_the_same_global_batches(scenes: Manifest, kind: str) -> None:
    source = source_of(scenes)
    alone = train(kind, source, micro_batch=2)
    shared = [train(kind, source, micro_batch=2, rank=rank, world_size=2) for rank in range(2)]
    mixed = [batch for pair in zip(*shared, strict=True) for batch in pair]
    assert_same(mixed, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_at_any_step_with_the_same_batches(scenes: Manifest, kind: str) -> None:
    source = source_of(scenes)
    whole = train(kind, source, stop=7, micro_batch=2)
    for start in (1, 5):
        assert_same(train(kind, source, start, 7, micro_batch=2), whole[2 * start :])
    assert_same(train(kind, source, stop=7, micro_batch=2, num_threads=3, prefetch=4), whole)


def test_every_epoch_has_each_image_with_objects_once_and_draws_anew(scenes: Manifest) -> None:
    source = source_of(scenes)
    batches = train("torch", source, stop=2 * COUNT, global_batch=1, micro_batch=1)
    ids = [int(batch.ids[0]) for batch in batches]
    assert sorted(ids[:COUNT]) == sorted(ids[COUNT:]) == list(range(COUNT))
    first = {int(batch.ids[0]): batch for batch in batches[:COUNT]}
    again = {int(batch.ids[0]): batch for batch in batches[COUNT:]}
    assert any(not torch.equal(first[number].sizes, again[number].sizes) for number in range(COUNT))
    shorts = {int(batch.sizes.min()) for batch in batches if int(batch.sizes.max()) < VIEW.long_side - 1}
    assert {round(short / 8) * 8 for short in shorts} == set(VIEW.short_sides)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_shows_every_image_once_crowds_and_empty_ones_included(
    scenes: Manifest, kind: str, world_size: int
) -> None:
    source = source_of(scenes, with_masks=False)
    seen, crowds, objects = [], 0, 0
    lengths = set()
    for rank in range(world_size):
        with open_eval(kind, source, batch_size=3, rank=rank, world_size=world_size, num_threads=1) as loader:
            batches = list(loader)
        lengths.add(len(batches))
        for batch in batches:
            assert batch.images.shape[0] == 3
            for row, valid in enumerate(batch.valid.tolist()):
                if not valid:
                    assert len(batch.targets[row].labels) == 0
                    continue
                sample = int(batch.ids[row])
                seen.append(sample)
                size = [int(scenes.heights[sample]), int(scenes.widths[sample])]
                assert batch.source_sizes[row].tolist() == size
                assert batch.sizes[row].tolist() == resized(np.array([size]), np.array([72]), 100)[0].tolist()
                crowds += int(batch.targets[row].crowd.sum())
                objects += len(batch.targets[row].labels)
    assert sorted(seen) == list(range(COUNT + EMPTY))
    assert scenes.instances is not None
    assert objects == len(scenes.instances)
    assert crowds == sum(int(scenes.instances.of(row).crowd.sum()) for row in range(COUNT)) > 0
    assert len(lengths) == 1


def test_a_limit_keeps_the_same_images_in_every_epoch(scenes: Manifest) -> None:
    source = source_of(scenes, limit=5)
    batches = train("torch", source, stop=10, global_batch=1, micro_batch=1)
    ids = [int(batch.ids[0]) for batch in batches]
    assert sorted(ids[:5]) == sorted(ids[5:])
    assert len(set(ids)) == 5


def damaged(root: Path) -> Manifest:
    sizes = [(48, 64)] * 6
    write(root, content_of(sizes, [annotation(n + 1, 10 * (n + 1), 2, [5, 5, 20, 20]) for n in range(6)]))
    path = root / "train2017/0002.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    (root / "train2017/0004.jpg").write_bytes(b"no image")
    return datasets.load("coco", root, "train")


@pytest.mark.parametrize("kind", KINDS)
def test_bad_images_are_replaced_in_training_and_count_nowhere_in_evaluation(tmp_path: Path, kind: str) -> None:
    manifest = damaged(tmp_path)
    source = source_of(manifest, on_bad_image="skip")
    with open_train(kind, source, start_step=0, stop_step=4, global_batch=6, micro_batch=6, num_threads=1) as loader:
        batches = list(loader)
        assert set(loader.skipped) == {2, 4}
    for batch in batches:
        assert sorted(batch.ids.tolist()) == [0, 1, 3, 3, 5, 5]
        assert all(len(target.labels) == 1 for target in batch.targets)
    with open_eval(kind, source, batch_size=4, num_threads=1) as loader:
        kept = [int(number) for batch in loader for number in batch.ids[batch.valid]]
        assert set(loader.skipped) == {2, 4}
    assert kept == [0, 1, 3, 5]
    strict = source_of(manifest)
    with (
        pytest.raises(DataError, match=r"000[24]\.jpg.*data\.on_bad_image=skip"),
        open_eval(kind, strict, batch_size=4, num_threads=1) as loader,
    ):
        list(loader)


def test_objects_without_a_segmentation_are_left_out_only_where_masks_are_wanted(tmp_path: Path) -> None:
    content = content_of([(48, 64)], [annotation(n, 10, 2, [5, 5, 20, 20]) for n in (1, 2)])
    del content["annotations"][0]["segmentation"]
    write(tmp_path, content)
    manifest = datasets.load("coco", tmp_path, "train")
    counts = {
        masks: len(train("dali", source_of(manifest, with_masks=masks), stop=1)[0].targets[0].labels)
        for masks in (True, False)
    }
    assert counts == {True: 1, False: 2}
    del content["annotations"][1]["segmentation"]
    rewrite(tmp_path, content)
    with pytest.raises(DataError, match="has no segmentations"):
        source_of(datasets.load("coco", tmp_path, "train"))


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_without_an_area_in_the_image_are_no_targets(tmp_path: Path, kind: str) -> None:
    boxes = [[5.0, 5.0, 0.0, 9.0], [5.0, 5.0, 20.0, 20.0], [70.0, 5.0, 9.0, 9.0], [5.0, 60.0, 9.0, -30.0]]
    write(tmp_path, content_of([(48, 64)], [annotation(n + 1, 10, 2, box) for n, box in enumerate(boxes)]))
    source = source_of(datasets.load("coco", tmp_path, "train"))
    assert len(source.table) == 4
    with open_eval(kind, source, batch_size=1, num_threads=1) as loader:
        (shown,) = loader
    (trained,) = train(kind, source, stop=1, global_batch=1, micro_batch=1)
    for target in (shown.targets[0], trained.targets[0]):
        assert len(target.boxes) == len(target.labels) == len(target.masks) == 1
        assert (target.boxes[:, 2:] > target.boxes[:, :2]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_decoded_one_after_the_other(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, content_of([(48, 64)], [annotation(n, 10, 2, [n, 5, 20, 20]) for n in range(1, 10)]))
    source = source_of(datasets.load("coco", tmp_path, "train"))
    own, counts = run_lengths.compiled.decode, []

    def decode(runs: list[dict[str, Any]]) -> np.ndarray:
        counts.append(len(runs))
        return np.asarray(own(runs))

    monkeypatch.setattr(run_lengths.compiled, "decode", decode)
    (batch,) = train(kind, source, stop=1, global_batch=1, micro_batch=1)
    assert len(batch.targets[0].masks) == 9
    assert set(counts) == {1}


def test_an_image_with_a_crowd_alone_is_trained_on_without_objects(tmp_path: Path) -> None:
    write(tmp_path, content_of([(48, 64)] * 2, [annotation(1, 10, 2, [5, 5, 20, 20], iscrowd=1)]))
    for kind in KINDS:
        (batch,) = train(
            kind, source_of(datasets.load("coco", tmp_path, "train")), stop=1, global_batch=2, micro_batch=2
        )
        assert batch.ids.tolist() == [0, 0]
        for target, size in zip(batch.targets, batch.sizes.tolist(), strict=True):
            assert target.boxes.shape == (0, 4)
            assert target.masks.shape == (0, *size)


def test_targets_may_be_written_to_without_touching_the_data_set(scenes: Manifest) -> None:
    source = source_of(scenes)
    batch = train("dali", source, stop=1)[0]
    before = [target.labels.clone() for target in batch.targets]
    for target in batch.targets:
        target.labels.add_(1)
        target.boxes.zero_()
        target.masks.zero_()
    again = train("dali", source, stop=1)[0]
    assert all(torch.equal(one, target.labels) for one, target in zip(before, again.targets, strict=True))
    assert any(target.masks.any() for target in again.targets)


def test_batches_outlive_their_loader(scenes: Manifest) -> None:
    batches = train("dali", source_of(scenes), stop=8)
    copies = [(batch.images.clone(), [target.masks.clone() for target in batch.targets]) for batch in batches]
    train("dali", source_of(scenes, seed=9), stop=8)
    for batch, (images, masks) in zip(batches, copies, strict=True):
        assert torch.equal(batch.images, images)
        assert all(torch.equal(target.masks, mask) for target, mask in zip(batch.targets, masks, strict=True))


def test_a_box_at_the_edge_stays_inside_after_rounding(scenes: Manifest) -> None:
    source = source_of(scenes)
    for row in range(COUNT):
        ids = np.array([row])
        for epoch in range(20):
            plan = source.plan_training(0, np.array([epoch]), ids)
            boxes, (height, width) = moved_boxes(plan, 0), plan.sizes[0].tolist()
            assert (boxes >= 0).all()
            assert (boxes <= np.array([width, height, width, height])).all()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"short_sides": ()}, "at least one number"),
        ({"short_sides": (0,)}, "at least one number"),
        ({"short_sides": (800,), "long_side": 799}, "800 or more would work"),
        ({"divisor": 0}, "divisor 0"),
        ({"std": (1.0, 0.0, 1.0)}, "above 0"),
    ],
)
def test_a_view_that_cannot_be_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LorotError, match=complaint):
        InstanceView(**options)


def test_a_source_that_cannot_be_loaded_is_refused(scenes: Manifest, files: Manifest, tmp_path: Path) -> None:
    with pytest.raises(LorotError, match="on_bad_image 'ignore'"):
        source_of(scenes, on_bad_image="ignore")
    with pytest.raises(DataError, match="use a data set of COCO's format"):
        source_of(files)
    with pytest.raises(LorotError, match="there are dali, torch"):
        train("stock", source_of(scenes))
    write(tmp_path, content_of([(48, 64)], []))
    empty = datasets.load("coco", tmp_path, "train")
    assert empty.instances is not None
    with pytest.raises(DataError, match="has an object in it"):
        train("dali", source_of(empty, with_masks=False))
    assert instances.InstanceSource(empty, VIEW, 0, with_masks=False).evaluation_order.length == 1
