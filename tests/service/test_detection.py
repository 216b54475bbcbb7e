"""A detector's job, part by part: what it begins with, what a micro-batch teaches, how it is evaluated."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from small_model import CARD, network, written
from small_scenes import CLASSES, drawn, job

from pipelines.instances import InstanceBatch
from service import bundle, config, config_file, detection_config, splits
from service.config import DetectionConfig
from service.errors import CheckpointError, ConfigError
from service.models.detectors import Detections, SoftMasks
from service.run_folder import RunFolder
from service.training import backbone, checkpoint, detection, distributed
from service.training.engine import Engine
from service.training.engine_settings import is_channels_last
from service.training.lengths import Lengths


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detection")
    drawn(folder / "scenes")
    written(folder / "model")
    return folder


def opened(config: DetectionConfig) -> detection.Detection:
    folder = RunFolder(config.folder)
    folder.make()
    return detection.open_task(config, folder, distributed.connect("cpu"), *splits.load(config))


def batches(task: detection.Detection, steps: int = 1) -> list[InstanceBatch]:
    with task.open_train(0, steps) as loader:
        return list(loader)


def test_a_micro_batch_teaches_the_detectors_own_loss_and_its_parts_are_averaged_over_images(root: Path) -> None:
    config = job(root, root / "model", name="learns")
    task = opened(config)
    torch.manual_seed(config.seed)
    model = task.build()
    one, other = batches(task)
    expected = [model(batch.images, batch.sizes, batch.targets) for batch in (one, other)]
    engine, meters = Engine(config, model, distributed.connect("cpu")), task.meters()
    losses = [detection.learn(config, engine, batch, meters) for batch in (one, other)]
    engine.close()
    assert [float(loss) for loss in losses] == [float(each["loss"]) for each in expected]
    found = meters.collect().metrics
    assert found.keys() == {"loss", "class_loss", "box_loss"}
    for name, value in found.items():
        assert value == pytest.approx(sum(float(each[name]) for each in expected) / 2, rel=1e-6), name
    assert losses[0].requires_grad


def test_the_trunk_has_the_registered_weights_and_the_rest_follows_from_the_seed(root: Path) -> None:
    task = opened(job(root, root / "model", name="builds"))
    torch.manual_seed(5)
    first = task.build().state_dict()
    torch.manual_seed(5)
    assert all(torch.equal(value, first[name]) for name, value in task.build().state_dict().items())
    theirs = network().state_dict()
    body = {name.removeprefix("backbone.body."): value for name, value in first.items() if ".body." in name}
    assert len(body) > 10
    assert all(torch.equal(value, theirs[name]) for name, value in body.items())
    assert task.start(task.build()) == f"retinanet on resnet_small from {root / 'model'}"


class Oracle:
    """In place of a network: it finds the very objects that the batch it is given holds, or what is made of them."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift, self.seen, self.current = shift, [], None

    def watching(self, loader: Iterator[InstanceBatch]) -> Iterator[InstanceBatch]:
        for batch in loader:
            self.current = batch
            self.seen += batch.ids[batch.valid].tolist()
            yield batch

    def __call__(self, images: torch.Tensor, sizes: torch.Tensor) -> list[Detections]:
        assert self.current is not None
        found = []
        for target in self.current.targets:
            boxes = target.boxes[~target.crowd] + self.shift
            found.append(Detections(boxes, torch.ones(len(boxes)), target.labels[~target.crowd], None))
        return found


@pytest.mark.parametrize(("shift", "low", "high"), [(0.0, 0.999, 1.0), (30.0, 0.0, 0.1)])
def test_who_finds_the_objects_scores_1_over_every_image_once(
    root: Path, shift: float, low: float, high: float
) -> None:
    # Four of six in the last batch but one, two and padding in the last.
    config = job(root, root / "model", name="scores", global_batch=4, micro_batch=4)
    task, oracle = opened(config), Oracle(shift)
    with task.open_eval() as loader:
        found = task.evaluate(oracle, oracle.watching(iter(loader)), lambda: False, lambda _: contextlib.nullcontext())
    assert found is not None
    assert low <= found["AP"] <= high
    assert found.keys() >= {"AP", "AP50", "AP75", "AR100", "images_per_s"}
    assert sorted(oracle.seen) == list(range(6))


def test_an_evaluation_gives_up_when_a_signal_asks_for_it(root: Path) -> None:
    task, oracle = opened(job(root, root / "model", name="stops")), Oracle()
    asked = iter([False, True])
    with task.open_eval() as loader:
        batches = oracle.watching(iter(loader))
        assert task.evaluate(oracle, batches, lambda: next(asked), lambda _: contextlib.nullcontext()) is None


def test_what_is_found_is_scored_while_the_others_are_told_to_wait(root: Path) -> None:
    task, oracle = opened(job(root, root / "model", name="waits")), Oracle()
    seen: list[str] = []

    @contextlib.contextmanager
    def together(phase: str) -> Iterator[None]:
        # By then no batch is left to give a sign of life.
        assert sorted(oracle.seen) == list(range(6))
        seen.append(f"{phase} begins")
        yield
        seen.append("ends")

    with task.open_eval() as loader:
        task.evaluate(oracle, oracle.watching(iter(loader)), lambda: False, together)
    assert seen == ["scoring what was found begins", "ends"]


def test_boxes_are_told_in_pixels_of_the_image_on_disk() -> None:
    # An input of 2 x 4 pixels of an image of 6 x 8: three times as high, twice as wide.
    boxes = torch.tensor([[1.0, 0.0, 3.0, 2.0]])
    assert detection.boxes_in_source(boxes, (2, 4), (6, 8)).tolist() == [[2.0, 0.0, 6.0, 6.0]]


def by_hand(soft: torch.Tensor, size: tuple[int, int], source_size: tuple[int, int], threshold: float) -> np.ndarray:
    """One mask, probability by probability: along each axis to the padded input, cut, and on to the source."""

    def enlarged(values: np.ndarray, length: int) -> np.ndarray:
        centres = (np.arange(length) + 0.5) * len(values) / length - 0.5
        return np.interp(centres.clip(0, len(values) - 1), np.arange(len(values)), values)

    def along(values: np.ndarray, axis: int, length: int) -> np.ndarray:
        return np.apply_along_axis(enlarged, axis, values, length)

    whole = along(along(soft.double().numpy(), 0, 4 * soft.shape[0]), 1, 4 * soft.shape[1])[: size[0], : size[1]]
    return along(along(whole, 0, source_size[0]), 1, source_size[1]) > threshold


@pytest.mark.parametrize("source_size", [(26, 40), (97, 61), (11, 15)])
def test_masks_are_compared_with_the_threshold_once_over_the_image_on_disk(source_size: tuple[int, int]) -> None:
    probabilities = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    size, threshold = (26, 40), 0.6
    runs = detection.runs_in_source(SoftMasks(probabilities, 4, threshold), size, source_size)
    for own, soft in zip(runs, probabilities, strict=True):
        expected = by_hand(soft, size, source_size, threshold)
        mask = coco_mask.decode({"size": list(source_size), "counts": own}).astype(bool)
        assert mask.shape == source_size
        # Float32 and float64 may differ at the very threshold.
        assert (mask != expected).mean() < 0.002
        assert 0.05 < mask.mean() < 0.95
    assert detection.runs_in_source(SoftMasks(probabilities[:0], 4, threshold), size, source_size) == []


def test_masks_over_the_image_on_disk_are_held_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    encode = detection.run_lengths.encode
    monkeypatch.setattr(detection.run_lengths, "encode", lambda masks: seen.append(masks.shape) or encode(masks))
    assert len(detection.runs_in_source(SoftMasks(torch.rand(5, 8, 8), 4, 0.5), (32, 32), (50, 60))) == 5
    assert seen == [(1, 50, 60)] * 5


def test_two_names_for_the_same_images_are_refused_unless_that_is_meant(root: Path) -> None:
    view = {"root": str(root / "scenes"), "short_sides": [64], "long_side": 96, "loader": "torch"}
    same = {"annotations": "annotations/instances_train2017.json", "images": "train2017"}
    with pytest.raises(ConfigError, match=r"'val' holds the very images of 'train'.*\{split\}.*data\.eval_split=train"):
        opened(job(root, root / "model", name="same", data={**view, "options": same}))
    opened(job(root, root / "model", name="meant", data={**view, "options": same, "eval_split": "train"}))
    apart = {"annotations": "annotations/instances_{split}2017.json", "images": "{split}2017"}
    opened(job(root, root / "model", name="apart", data={**view, "options": apart}))


# Eleven of the scenes have objects: 2.75 steps of 4 an epoch.
@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"duration": "2 epochs"}, None),
        ({"duration": "8 steps", "schedule": {"warmup": "2 steps"}}, "the rate falls at step 22, 31 of 8 only"),
        ({"duration": "8 steps", "schedule": {"warmup": "2 steps"}}, r"milestones='\[5 steps, 7 steps\]' would do"),
        ({"duration": "9 steps", "schedule": {"milestones": ["3 steps"]}}, "'500 steps' ends at step 500 of 9"),
        ({"duration": "9 steps", "schedule": {"name": "cosine", "warmup": "9 steps"}}, "warmup='0 steps' would do"),
        ({"duration": "9 steps", "schedule": {"name": "cosine", "warmup": "8 steps"}}, None),
        ({"duration": "9 steps", "schedule": {"warmup": "8 steps", "milestones": ["2 epochs", "8 steps"]}}, None),
        ({"duration": "9 steps", "schedule": {"warmup": "0 steps", "milestones": ["3 epochs"]}}, "step 9 of 9 only"),
    ],
)
def test_a_run_that_is_too_short_for_its_schedule_is_refused_with_what_works(
    root: Path, values: dict[str, Any], told: str | None
) -> None:
    config = job(root, root / "model", name="short", **values)
    if told is None:
        opened(config)
        return
    with pytest.raises(ConfigError, match=told):
        opened(config)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 11, 12, 400])
def test_the_schedule_that_is_proposed_is_accepted(root: Path, total: int) -> None:
    def asked(overrides: list[str]) -> DetectionConfig:
        values: dict[str, Any] = {"job": "detect", "model": {"backbone": "x"}, "duration": f"{total} steps"}
        for override in overrides:
            config_file.assign(values, override)
        found = config.resolve_any(values)
        assert isinstance(found, DetectionConfig)
        return found

    with pytest.raises(ConfigError) as refused:
        detection_config.check_schedule(asked([]), total, samples=1000)
    proposed = re.findall(r"(schedule\.\w+=(?:'[^']*'|\w+)) would do", str(refused.value))
    assert len(proposed) == 2
    detection_config.check_schedule(asked([one.replace("'", "") for one in proposed]), total, samples=1000)


def test_splits_of_other_classes_are_refused(root: Path) -> None:
    config = job(root, root / "model", name="differs")
    train_set, eval_set = splits.load(config)
    other = dataclasses.replace(eval_set.heading, classes=("a", "b", "c"))
    eval_set.heading = other
    folder = RunFolder(config.folder)
    with pytest.raises(ConfigError, match="they are named differently"):
        detection.open_task(config, folder, distributed.connect("cpu"), train_set, eval_set)


def test_a_resumed_run_has_to_agree_in_backbone_view_and_detector(root: Path) -> None:
    def facts(**values: Any) -> dict[str, Any]:
        config = job(root, values.pop("model", root / "model"), name="facts", **values)
        task = opened(config)
        return task.facts(Lengths.of(config, task.num_samples))

    known = facts()
    assert known == facts()
    assert json.loads(json.dumps(known)) == known
    assert known["model.backbone"] == bundle.read_card(root / "model").weights_sha256
    written(root / "other", seed=1)
    view = {"root": str(root / "scenes"), "short_sides": [96], "long_side": 96, "loader": "torch"}
    for differing, changed in (
        ({"model.backbone"}, facts(model=root / "other")),
        ({"data.short_sides"}, facts(data=view)),
        ({"micro_batch"}, facts(micro_batch=1)),
        ({"data.train_limit", "samples_per_epoch"}, facts(data=view | {"short_sides": [64], "train_limit": 3})),
    ):
        assert {name for name in known if changed[name] != known[name]} == differing


# What it begins with.


def begun(config: DetectionConfig) -> RunFolder:
    """A run that has come to its first checkpoint."""
    folder = RunFolder(config.folder)
    folder.make()
    backbone.take(config, folder, distributed.connect("cpu"))
    checkpoint.save(folder.checkpoints, 1, {"weights": {}}, facts={})
    return folder


def test_a_resumed_run_needs_the_model_no_more_and_keeps_its_lineage(tmp_path: Path) -> None:
    written(tmp_path / "model", dataclasses.replace(CARD, run_id="abc"))
    config = job(tmp_path, tmp_path / "model")
    folder = begun(config)
    (tmp_path / "model" / "model.json").unlink()
    found = backbone.take(config, folder, distributed.connect("cpu"))
    assert (found.resolved.uri, found.resolved.run_id) == (str(tmp_path / "model"), "abc")
    ours, theirs = found.classifier().state_dict(), network().state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_run_that_began_with_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    written(tmp_path / "model")
    written(tmp_path / "same")
    written(tmp_path / "other", seed=1)
    folder = begun(job(tmp_path, tmp_path / "model"))
    # Under another name the same weights are welcome.
    backbone.take(job(tmp_path, tmp_path / "same"), folder, distributed.connect("cpu"))
    with pytest.raises(CheckpointError, match=r"this run began with .*model .*, and .*other is"):
        backbone.take(job(tmp_path, tmp_path / "other"), folder, distributed.connect("cpu"))


def test_a_run_that_never_came_to_a_checkpoint_leaves_no_model_to_the_next(tmp_path: Path) -> None:
    written(tmp_path / "model")
    written(tmp_path / "other", seed=1)
    folder = RunFolder(job(tmp_path, tmp_path / "model").folder)
    folder.make()
    backbone.take(job(tmp_path, tmp_path / "model"), folder, distributed.connect("cpu"))
    found = backbone.take(job(tmp_path, tmp_path / "other"), folder, distributed.connect("cpu"))
    assert found.card.weights_sha256 == bundle.read_card(tmp_path / "other").weights_sha256


def test_a_half_written_model_is_refused_by_its_checksum(tmp_path: Path) -> None:
    written(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    config = job(tmp_path, tmp_path / "model")
    folder = RunFolder(config.folder)
    folder.make()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or incomplete"):
        backbone.take(config, folder, distributed.connect("cpu"))
    assert not (folder.path / "backbone").exists()


def test_weights_that_are_of_another_network_than_the_card_says_are_refused_by_layer(root: Path) -> None:
    wider = dataclasses.replace(CARD, model={**CARD.model, "width": 16})
    bundle.write_bundle(root / "lies", network().state_dict(), wider)
    task = opened(job(root, root / "lies", name="lies"))
    with pytest.raises(
        CheckpointError, match=r"do not fit the network:\n(.*\n)*.*layer1\.0\.conv1\.weight: \(8, 4, 3, 3\)"
    ):
        task.build()


def test_a_backbone_without_the_maps_that_a_detector_needs_is_refused_with_its_stages(root: Path) -> None:
    task = opened(job(root, root / "model", name="shallow"))
    found = task._backbone.classifier()
    # Everything after the stem, as if the registered network had no stages.
    for name in ("layer1", "layer2", "layer3"):
        delattr(found, name)

    class Bare:
        resolved, card = task._backbone.resolved, task._backbone.card

        def classifier(self) -> Any:
            return found

    task._backbone = Bare()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"model: no backbone for retinanet: the trunk has no stages layer1"):
        task.build()


def test_the_first_samples_are_drawn_with_their_objects(root: Path, tmp_path: Path) -> None:
    task = opened(job(root, root / "model", name="shows"))
    task.show(batches(task)[0], tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 1000
    assert len(task._train_set.classes) == CLASSES


@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("cuda", True)])
def test_on_a_cpu_a_detectors_tensors_are_contiguous(root: Path, device: str, expected: bool) -> None:
    found = is_channels_last(job(root, root / "model"), torch.device(device))
    assert found is expected
    assert is_channels_last(config.resolve({}), torch.device(device))
