"""Localization scores on images whose answer is known, against a slow per-image oracle, and recorded with the model."""

import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy import ndimage
from torch import nn
from torchvision.ops import box_iou

from pipelines import loading, manifest, pretext
from pipelines.manifest import Heading, Manifest, Rows
from pipelines.plan import View, eval_plan
from pipelines.reading import Source
from service import bundle, recovery, registry, store
from service.bundle import Card, write_bundle
from service.config import ModelConfig, TrackingConfig
from service.downstream import localization, subject, wsol
from service.downstream.protocol import OFFICIAL, PAPER, Protocol
from service.downstream.scores import CAM_THRESHOLDS, CENTRE_SHARES, IOU_THRESHOLDS, Tally
from service.errors import ConfigError, DataError
from service.models import Classifier, build
from service.tracking import open_run

WHOLE = View(size=32, crop="whole", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CLASSES = ("red", "blue")


def data_set(
    root: Path,
    images: list[np.ndarray],
    labels: list[int],
    truths: list[np.ndarray],
    classes: tuple[str, ...] = CLASSES,
) -> Manifest:
    for index, image in enumerate(images):
        Image.fromarray(image).save(root / f"{index}.png")
    rows = Rows(
        labels=np.array(labels),
        heights=np.array([image.shape[0] for image in images]),
        widths=np.array([image.shape[1] for image in images]),
        paths=[f"{index}.png" for index in range(len(images))],
        box_counts=np.array([len(truth) for truth in truths]),
        boxes=np.concatenate(truths).astype(np.float32),
    )
    manifest.write(root / "all.arrow", Heading("squares", "val", classes, classes, "0" * 64, ""), rows)
    return Manifest.open(root / "all.arrow", root)


def squares(root: Path, count: int, height: int, width: int, seed: int = 0) -> Manifest:
    """A red (label 0) or blue (label 1) rectangle with even corners in the middle square of a black image."""
    random = np.random.default_rng(seed)
    images, labels, truths = [], [], []
    side = min(height, width)
    for index in range(count):
        y, x = (2 * random.integers(0, side // 4, 2) + ((height - side) // 2, (width - side) // 2)).tolist()
        tall, wide = (2 * random.integers(2, side // 4, 2)).tolist()
        image = np.zeros((height, width, 3), np.uint8)
        image[y : y + tall, x : x + wide, (0, 2)[index % 2]] = 255
        images.append(image)
        labels.append(index % 2)
        truths.append(np.array([[x, y, x + wide, y + tall]]))
    return data_set(root, images, labels, truths)


def colour_model(swapped: bool = False) -> Classifier:
    """Its feature maps are the red and the blue channel, class 0 weighs red and class 1 blue (or the other way)."""
    pick = nn.Conv2d(3, 2, 1, bias=False)
    model = Classifier({"pick": pick}, 2, 2, 0).eval()
    with torch.no_grad():
        pick.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]).view(2, 3, 1, 1))
        model.fc.weight.copy_(torch.eye(2).flip(0) if swapped else torch.eye(2))
        model.fc.bias.zero_()
    return model


def measured(
    model: nn.Module, data: Manifest, view: View, batch_size: int = 4, protocol: Protocol = PAPER
) -> localization.Measured:
    source = Source(data, view, pretext.load("none"), seed=0)
    with loading.open_eval("torch", source, batch_size=batch_size, num_threads=1) as batches:
        return localization.measure(model, data, view, batches, len(data), protocol=protocol)


def test_a_model_that_sees_the_square_puts_its_box_exactly_there(tmp_path: Path) -> None:
    result = measured(colour_model(), squares(tmp_path, 6, 32, 32), WHOLE)
    assert (result.scores.gt_known == 1).all()
    assert (result.scores.top1_loc == 1).all()
    assert (result.scores.num_images, result.scores.num_located, result.scores.top1) == (6, 6, 1.0)


def test_boxes_return_to_a_source_that_is_not_square(tmp_path: Path) -> None:
    # The centre 48 of 48 x 80 (80 x 48) pixels is shown at 24: at half the height every edge is where it was.
    view = dataclasses.replace(WHOLE, size=24, crop="random_resized", eval_crop=1.0)
    for height, width in ((48, 80), (80, 48)):
        root = tmp_path / f"{height}"
        root.mkdir()
        scores = measured(colour_model(), squares(root, 5, height, width), view).scores
        assert scores.gt_known[list(CAM_THRESHOLDS).index(0.5)].tolist() == [1.0] * len(IOU_THRESHOLDS)


def test_a_wrong_answer_in_the_right_place_is_known_but_not_top1(tmp_path: Path) -> None:
    # Mean brightness decides, so the swapped model is always wrong; the map of the true class is then the black
    # channel, without contrast: a box of everything. Half of the images are overpainted to make that box right.
    data = squares(tmp_path, 4, 32, 32)
    everything = np.array([[0, 0, 32, 32]])
    images = [np.asarray(Image.open(tmp_path / f"{index}.png")) for index in range(4)]
    whole = tmp_path / "whole"
    whole.mkdir()
    data = data_set(whole, images, [0, 1, 0, 1], [everything, everything, data.boxes(2), data.boxes(3)])
    scores = measured(colour_model(swapped=True), data, WHOLE).scores
    assert scores.top1 == 0
    assert (scores.gt_known == 0.5).all()
    assert (scores.top1_loc == 0).all()
    assert scores.top5 == 1.0
    assert (scores.top5_loc == 0.5).all()


def test_under_the_official_protocol_the_centre_box_is_scored_within_the_crop_as_well(tmp_path: Path) -> None:
    # True boxes are as wide as the images, of which the network sees the middle square: cut to it, they are all of it.
    view = dataclasses.replace(WHOLE, size=24, crop="random_resized", eval_crop=1.0)
    images = [np.full((48, 96, 3), 50 * index, np.uint8) for index in range(1, 4)]
    data = data_set(tmp_path, images, [0, 1, 0], [np.array([[0, 0, 96, 48]])] * 3)
    full = list(CENTRE_SHARES).index(1.0)
    for protocol in (PAPER, OFFICIAL):
        scores = measured(colour_model(), data, view, protocol=protocol).scores
        assert (scores.centre_gt_known[full] == 1).all()
    shifted = tmp_path / "shifted"
    shifted.mkdir()
    data = data_set(shifted, images, [0, 1, 0], [np.array([[24, 0, 72, 48]])] * 3)
    whole, cut = (measured(colour_model(), data, view, protocol=one).scores for one in (PAPER, OFFICIAL))
    assert (cut.centre_gt_known[full] == 1).all()
    np.testing.assert_array_equal(whole.centre_gt_known[full], IOU_THRESHOLDS <= 0.5)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_every_image_counts_once_at_any_batch_size(tmp_path: Path, batch_size: int) -> None:
    torch.manual_seed(0)
    model = Classifier({"conv": nn.Conv2d(3, 4, 5, stride=4)}, 4, 2, 0).eval()
    data = squares(tmp_path, 10, 32, 40)
    expected, found = measured(model, data, WHOLE, 10), measured(model, data, WHOLE, batch_size)
    assert found.scores.num_images == 10
    assert [seen.id for seen in found.sightings] == list(range(10))
    for field in dataclasses.fields(expected.scores):
        name = field.name
        np.testing.assert_array_equal(getattr(found.scores, name), getattr(expected.scores, name), err_msg=name)


def test_the_grid_equals_a_slow_count_image_by_image(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    sizes = [(40, 64), (64, 40), (50, 50), (33, 70), (48, 31), (64, 64), (40, 40)]
    images = [random.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    truths = []
    for index, (height, width) in enumerate(sizes):
        low = random.uniform(0, 0.4, (index % 4, 2))
        corners = np.concatenate([low, low + random.uniform(0.2, 0.6, low.shape)], axis=1)
        truths.append(np.rint(corners * (width, height, width, height)))
    data = data_set(tmp_path, images, [0, 2, 2, 2, 1, 0, 2], truths, tuple("abc"))
    view = View(size=32, eval_crop=0.9)
    torch.manual_seed(1)
    model = Classifier({"conv": nn.Conv2d(3, 6, 8, stride=8), "relu": nn.ReLU()}, 6, 3, 0).eval()
    model.fc.bias.data.copy_(torch.tensor([0.0, 0.0, 9.0]))  # always answers 2

    gt_known = np.zeros((len(CAM_THRESHOLDS), len(IOU_THRESHOLDS)))
    top1_loc, centre = np.zeros_like(gt_known), np.zeros((len(CENTRE_SHARES), len(IOU_THRESHOLDS)))
    source = Source(data, view, pretext.load("none"), seed=0)
    for batch in loading.open_eval("torch", source, batch_size=1, num_threads=1):
        sample, label = int(batch.ids), int(batch.labels)
        height, width = sizes[sample]
        ((y, x, tall, wide),) = eval_plan(
            view, np.array([sample]), np.array([height]), np.array([width]), np.array([True])
        ).windows
        truth = torch.from_numpy(truths[sample]).float()
        if len(truth) == 0:
            continue
        with torch.no_grad():
            right = int(model(batch.images).logits.argmax()) == label
            coarse = (model.features(batch.images)[0] * model.fc.weight[label][:, None, None]).sum(0)
        heat = nn.functional.interpolate(coarse[None, None], size=32, mode="bilinear")[0, 0].numpy()
        for t, threshold in enumerate(CAM_THRESHOLDS):
            parts, _ = ndimage.label((heat - heat.min()) / np.ptp(heat) >= np.float32(threshold), np.ones((3, 3)))
            rows, columns = ndimage.find_objects(parts)[int(np.bincount(parts.ravel())[1:].argmax())]
            box = [
                x + columns.start * wide / 32,
                y + rows.start * tall / 32,
                x + columns.stop * wide / 32,
                y + rows.stop * tall / 32,
            ]
            iou = float(box_iou(torch.tensor([box]), truth).max())
            gt_known[t] += iou >= IOU_THRESHOLDS
            top1_loc[t] += right and iou >= IOU_THRESHOLDS
        for k, share in enumerate(CENTRE_SHARES):
            dx, dy = share * width / 2, share * height / 2
            box = [width / 2 - dx, height / 2 - dy, width / 2 + dx, height / 2 + dy]
            centre[k] += float(box_iou(torch.tensor([box]), truth).max()) >= IOU_THRESHOLDS

    scores = measured(model, data, view).scores
    num_located = sum(len(truth) > 0 for truth in truths)
    assert (scores.num_images, scores.num_located) == (7, num_located)
    assert 0 < gt_known.sum() < gt_known.size * num_located
    assert top1_loc.sum() > 0
    np.testing.assert_allclose(scores.gt_known * num_located, gt_known)
    np.testing.assert_allclose(scores.top1_loc * num_located, top1_loc)
    np.testing.assert_allclose(scores.centre_gt_known * num_located, centre)


def test_readings_take_the_right_row_and_column_of_the_grid() -> None:
    # One image whose box has the IoU 0.55 up to the CAM threshold 0.6, then 0.95; a second one, misclassified, 0.75.
    cam_iou = np.stack([np.where(CAM_THRESHOLDS <= 0.6, 0.55, 0.95), np.full(len(CAM_THRESHOLDS), 0.75)])
    centre_iou = np.tile(CENTRE_SHARES, (2, 1))
    tally = Tally()
    tally.add(np.array([True, False]), np.array([True, True]), np.array([True, True]), cam_iou, centre_iou)
    scores = tally.scores()
    assert scores.along("cam") == {"top1_loc": (0.5,) * 5, "top5_loc": (1.0,) * 5, "gt_known": (1.0,) * 5}
    assert scores.along("iou", 0.2)["gt_known"] == (1.0, 0.5, 0.5, 0.0, 0.0)
    assert scores.along("iou", 0.2)["top1_loc"] == (0.5, 0.0, 0.0, 0.0, 0.0)
    assert scores.along("iou", 0.2)["top5_loc"] == (1.0, 0.5, 0.5, 0.0, 0.0)
    assert scores.along("iou", 0.7)["gt_known"] == (1.0, 1.0, 1.0, 0.5, 0.5)
    assert scores.along("iou", 0.7)["centre_gt_known"] == (1.0,) * 5
    assert (scores.best_cam_threshold, scores.max_box_acc) == (0.05, 1.0)
    assert scores.max_box_acc_v2 == pytest.approx((1 + 1 + 1) / 3)
    assert scores.centre_share == pytest.approx(0.5)


def test_an_image_without_a_box_counts_for_classification_only() -> None:
    tally = Tally()
    hit, rows = np.ones((2, len(CAM_THRESHOLDS))), np.ones((2, len(CENTRE_SHARES)))
    tally.add(np.array([True, False]), np.array([True, True]), np.array([False, True]), hit, rows)
    scores = tally.scores()
    assert (scores.num_images, scores.num_located, scores.top1, scores.top5) == (2, 1, 0.5, 1.0)
    assert (scores.gt_known == 1).all()
    assert (scores.top1_loc == 0).all()
    assert (scores.top5_loc == 1).all()


def test_data_without_boxes_or_with_other_classes_is_refused(tmp_path: Path) -> None:
    data = squares(tmp_path, 2, 32, 32)
    with pytest.raises(DataError, match="2 classes, models:/m/1 knows 3"):
        localization.check(data, ("red", "blue", "green"), "models:/m/1")
    with pytest.raises(DataError, match="class 1 is 'blue', but 'green'"):
        localization.check(data, ("red", "green"), "models:/m/1")
    bare = dataclasses.replace(rows_of(data), boxes=None, box_counts=None)
    manifest.write(tmp_path / "bare.arrow", data.heading, bare)
    with pytest.raises(DataError, match="no boxes"):
        localization.check(Manifest.open(tmp_path / "bare.arrow", tmp_path), CLASSES, "models:/m/1")


def rows_of(data: Manifest) -> Rows:
    return Rows(data.labels, data.heights, data.widths, [f"{index}.png" for index in range(len(data))])


def test_an_unknown_axis_or_protocol_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"cam .* and iou"):
        wsol.run("models:/m@latest", axis="both")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there are paper, official"):
        wsol.run("models:/m@latest", protocol="published")
    with pytest.raises(ConfigError, match="there are pixels, contours"):
        wsol.run("models:/m@latest", component="blobs")


def test_of_several_true_boxes_the_one_that_fits_best_counts(tmp_path: Path) -> None:
    data = squares(tmp_path, 4, 32, 32)
    far = np.array([[0, 0, 2, 2], [30, 30, 32, 32]], np.float32)
    images = [np.asarray(Image.open(tmp_path / f"{index}.png")) for index in range(4)]
    several = tmp_path / "several"
    several.mkdir()
    truths = [np.concatenate([far, data.boxes(index)]) for index in range(4)]
    scores = measured(colour_model(), data_set(several, images, [0, 1, 0, 1], truths), WHOLE).scores
    assert (scores.gt_known == 1).all()


def test_an_error_beside_the_network_ends_the_pass(tmp_path: Path) -> None:
    data = squares(tmp_path, 6, 32, 32)
    source = Source(data, WHOLE, pretext.load("none"), seed=0)
    with loading.open_eval("torch", source, batch_size=2, num_threads=1) as batches:
        strange = (batch._replace(ids=batch.ids + 1000) for batch in batches)
        with pytest.raises(IndexError):
            localization.measure(colour_model(), data, WHOLE, strange, len(data))


def test_a_registered_model_gets_its_results_beside_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    data = squares(images, 14, 32, 32)
    asked = []
    monkeypatch.setattr(subject.datasets, "load", lambda *given, **options: asked.append((*given, options)) or data)
    config = ModelConfig(name="resnet_small", width=8)
    view = bundle.evaluation_view(WHOLE)
    card = Card(
        model=config.model_dump(mode="json"), classes=CLASSES, view=view, data="squares", data_options={"count": 14},
        root="somewhere", split="val", metrics={"val/top1": 0.5},
    )  # fmt: skip
    write_bundle(tmp_path / "model", build(config, 2, 0).state_dict(), card)
    training = TrackingConfig(system_metrics=False)
    run = open_run(training, name="training", folder=tmp_path / "run")
    registry.register(tmp_path / "model", name="squares", run_id=run.run_id, metric="val/top1")
    run.finish()

    with pytest.raises(ConfigError, match="say where 'other' lies with --root"):
        wsol.run("models:/squares@latest", data="other")
    monkeypatch.chdir(tmp_path)
    result = wsol.run("models:/squares@latest", loader="torch", limit=4, progress=False)
    assert re.fullmatch(r"runs/wsol-squares-1-[0-9a-f]{8}", str(result.folder))
    assert (result.folder / "wsol.json").exists()
    asked.clear()
    result = wsol.run(
        "models:/squares@latest",
        loader="torch",
        output=tmp_path / "out",
        batch_size=4,
        progress=False,
        protocol="official",
    )

    assert asked == [("squares", "somewhere", "val", {"count": 14})]
    assert (result.model, result.version, result.run_id) == ("squares", 1, run.run_id)
    stored = json.loads((tmp_path / "out" / "wsol.json").read_text())
    assert stored == json.loads(json.dumps(result.to_dict()))
    assert stored["scores"]["num_images"] == 14
    assert len(stored["examples"]) == 12
    for example in stored["examples"]:
        assert Image.open(tmp_path / "out" / example["picture"]).size == (32, 32)

    record = store.client(place).get_run(result.record_id)
    assert record.info.status == "FINISHED"
    assert record.data.tags["mlflow.parentRunId"] == run.run_id
    assert (record.data.params["protocol"], record.data.params["component"]) == ("official", "contours")
    assert record.data.metrics["wsol/top5_loc:0.5"] == pytest.approx(result.top5_loc)
    assert record.data.metrics["wsol/gt_known:0.5"] == pytest.approx(result.gt_known)
    assert record.data.metrics["wsol/cam/top1_loc:0.7"] == pytest.approx(result.scores.along("cam")["top1_loc"][2])
    assert {item.path for item in store.client(place).list_artifacts(result.record_id)} >= {"wsol.json", "cam.png"}
    (row,) = registry.list_models()
    assert row.downstream["wsol.centre_box@0.5"] == pytest.approx(result.centre_box)

    console = Console(width=100, record=True, file=io.StringIO())
    wsol.show(result, console)
    shown = console.export_text()
    assert shown.index("axis=cam") < shown.index("axis=iou")
    assert f"{100 * result.gt_known:.2f}%" in shown
    assert "protocol official, largest component by contours" in shown
    other = dataclasses.replace(result, axis="iou", notice="3 records wait")
    wsol.show(other, console)
    shown = console.export_text()
    assert shown.index("axis=iou") < shown.index("axis=cam")
    assert "3 records wait" in shown


def test_a_folder_where_records_of_an_earlier_run_wait_is_not_written_into(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    data = squares(images, 4, 32, 32)
    monkeypatch.setattr(subject.datasets, "load", lambda *given, **options: data)
    card = Card(
        model=ModelConfig(name="resnet_small", width=8).model_dump(mode="json"), classes=CLASSES,
        view=bundle.evaluation_view(WHOLE), data="squares", root="somewhere", split="val",
    )  # fmt: skip
    write_bundle(tmp_path / "model", build(ModelConfig(name="resnet_small", width=8), 2, 0).state_dict(), card)

    def localize(protocol: str) -> wsol.Result:
        return wsol.run(
            str(tmp_path / "model"), loader="torch", output=tmp_path / "out", protocol=protocol, progress=False
        )

    first = localize("paper")
    assert first.notice == ""
    told = (tmp_path / "out" / "wsol.json").read_bytes()
    # As if the server had gone before the last records were sent.
    (tmp_path / "out" / "spool.sent").unlink()
    with pytest.raises(ConfigError, match=rf"wait there .* `lorot sync {tmp_path}/out` sends them, or choose another"):
        localize("official")
    assert (tmp_path / "out" / "wsol.json").read_bytes() == told
    assert recovery.run(tmp_path / "out", None, print)
    assert localize("official").protocol == "official"
    assert (tmp_path / "out" / "wsol.json").read_bytes() != told
