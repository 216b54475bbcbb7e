"""A detector's files: they come back as they were, and nothing is built from what was damaged or tampered with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import MODEL, network
from small_scenes import RETINANET

from service import detector_bundle
from service.detector_bundle import DetectorCard
from service.errors import CheckpointError
from service.models import detectors

CARD = DetectorCard(
    job="detect",
    name="retinanet",
    trunk=MODEL.model_dump(mode="json"),
    classes=("cat", "dog"),
    short_side=64,
    long_side=96,
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    options=RETINANET,
    class_ids=("1", "3"),
    metrics={"AP": 0.25, "APl": float("nan")},
)


def written(folder: Path, card: DetectorCard = CARD) -> detectors.Detector:
    torch.manual_seed(1)
    detector = detectors.build("retinanet", network(), len(card.classes), **RETINANET)
    detector_bundle.write(folder, detector.state_dict(), card)
    return detector


def test_a_detector_comes_back_with_its_weights_and_finds_the_same(tmp_path: Path) -> None:
    ours = written(tmp_path / "detector")
    theirs, card = detector_bundle.load(tmp_path / "detector")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    images, sizes = torch.randn(1, 3, 64, 96), torch.tensor([[64, 90]])
    (expected,), (got,) = ours(images, sizes), theirs(images, sizes)
    assert torch.equal(got.boxes, expected.boxes)
    # What cannot be said is left out.
    assert (card.metrics, card.classes, card.class_ids) == ({"AP": 0.25}, ("cat", "dog"), ("1", "3"))
    assert not theirs.training


def test_weights_that_are_cut_short_or_of_another_network_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "cut")
    weights = tmp_path / "cut" / "detector.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"detector\.safetensors: damaged or incomplete"):
        detector_bundle.load(tmp_path / "cut")
    written(tmp_path / "other", dataclasses.replace(CARD, options={**RETINANET, "fpn_channels": 32}))
    with pytest.raises(CheckpointError, match=r"do not fit the network:\n.*fpn"):
        detector_bundle.load(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"no detector here \(detector\.json: No such file"):
        detector_bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"job": "classify"}, "job"),
        ({"format": 2}, "format"),
        ({"classes": []}, "classes"),
        ({"short_side": 0}, "short_side"),
        ({"short_side": "64"}, "short_side"),
        ({"std": [0.2, 0.0, 0.2]}, "std"),
        ({"trunk": {"name": "resnet_huge"}}, "name"),
        ({"weights_sha256": "../../etc"}, "weights_sha256"),
        ({"more": 1}, "more"),
        ({"name": "fasterrcnn"}, "there is no detector 'fasterrcnn'"),
        ({"options": {"fpn_chanels": 3}}, "fpn_chanels"),
    ],
)
def test_a_card_that_was_tampered_with_is_refused_by_its_key(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    written(tmp_path / "detector")
    path = tmp_path / "detector" / "detector.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(CheckpointError, match=named):
        detector_bundle.load(tmp_path / "detector")
