"""RetinaNet over our trunks: torchvision's own is the oracle, for losses and for detections."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn

from pipelines.instances import Instances
from service.config import ModelConfig
from service.errors import ConfigError
from service.models import build as build_classifier
from service.models import detectors
from service.models.detections import Detections, Detector
from tests.service.drawn_objects import nothing

SIZES = ((96, 128), (160, 96))


def _trunk(name: str, **options: object) -> nn.Module:
    return build_classifier(ModelConfig.model_validate({"name": name, **options}), 5, 4)


@pytest.fixture(scope="module")
def oracle() -> nn.Module:
    """torchvision's, taking images as they are, with weights that find something, and BatchNorm at rest."""
    torch.manual_seed(0)
    network = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=96, image_mean=[0, 0, 0], image_std=[1, 1, 1]
    )
    nn.init.normal_(network.head.classification_head.cls_logits.weight, std=0.3)
    nn.init.normal_(network.head.regression_head.bbox_reg.weight, std=0.1)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return network


def _ours(oracle: nn.Module, **options: object) -> Detector:
    trunk = _trunk("resnet50")
    ours = detectors.build("retinanet", trunk, 4, **{"trainable_layers": 5, "frozen_batchnorm": False, **options})
    assert list(ours.state_dict()) == list(oracle.state_dict())
    ours.load_state_dict(oracle.state_dict())
    return ours.eval()


@pytest.fixture(scope="module")
def ours(oracle: nn.Module) -> Detector:
    return _ours(oracle)


def _batch() -> tuple[list[torch.Tensor], torch.Tensor, list[Instances]]:
    """Images of two sizes as torchvision takes them, the same padded into one batch, and targets."""
    images = [torch.randn(3, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(SIZES)]
    padded = torch.zeros(2, 3, 160, 128)
    for image, place in zip(images, padded, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    boxes = (torch.tensor([[10.0, 8, 60, 50], [30, 20, 100, 90]]), torch.tensor([[5.5, 70, 40, 150]]))
    labels = (torch.tensor([0, 3]), torch.tensor([2]))
    targets = [
        Instances(box, label, torch.zeros(0, 0, 0, dtype=torch.uint8), torch.zeros(len(box), dtype=torch.bool))
        for box, label in zip(boxes, labels, strict=True)
    ]
    return images, padded.contiguous(memory_format=torch.channels_last), targets


def test_all_five_levels_are_torchvisions(oracle: nn.Module, ours: Detector) -> None:
    images = _batch()[1]
    with torch.no_grad():
        levels, expected = ours.backbone(images), oracle.backbone(images)
    assert list(levels) == list(expected) == ["0", "1", "2", "p6", "p7"]
    for name, maps in expected.items():
        torch.testing.assert_close(levels[name], maps)


@pytest.mark.parametrize("objects", ["both", "one image has none", "no image has any"])
def test_losses_are_torchvisions(oracle: nn.Module, ours: Detector, objects: str) -> None:
    images, padded, targets = _batch()
    if objects != "both":
        targets[0] = nothing()
    if objects == "no image has any":
        targets[1] = nothing()
    with torch.no_grad():
        expected = oracle(images, [{"boxes": target.boxes, "labels": target.labels} for target in targets])
        losses = ours(padded, torch.tensor(SIZES), targets)
    assert tuple(losses) == detectors.loss_names("retinanet")
    torch.testing.assert_close(losses["class_loss"], expected["classification"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["box_loss"], expected["bbox_regression"], rtol=1e-4, atol=1e-5)
    assert losses["loss"] == losses["class_loss"] + losses["box_loss"]
    assert (losses["box_loss"] > 0) == (objects != "no image has any")


def test_detections_are_torchvisions(oracle: nn.Module, ours: Detector) -> None:
    images, padded, _ = _batch()
    with torch.no_grad():
        expected = copy.deepcopy(oracle).eval()(images)
    found = ours(padded.contiguous(), torch.tensor(SIZES))
    for ours_one, theirs, (height, width) in zip(found, expected, SIZES, strict=True):
        assert isinstance(ours_one, Detections)
        assert ours_one.masks is None
        assert 10 < len(ours_one.boxes) <= 300
        assert torch.equal(ours_one.labels, theirs["labels"])
        torch.testing.assert_close(ours_one.boxes, theirs["boxes"])
        torch.testing.assert_close(ours_one.scores, theirs["scores"])
        assert ours_one.boxes[:, 2].max() <= width
        assert ours_one.boxes[:, 3].max() <= height


def test_crowds_and_boxes_without_area_teach_nothing(ours: Detector) -> None:
    _, padded, targets = _batch()
    more = targets[0]
    crowded = Instances(
        torch.cat([more.boxes, torch.tensor([[40.0, 40, 90, 90], [7, 7, 7, 30]])]),
        torch.cat([more.labels, torch.tensor([1, 1])]),
        more.masks,
        torch.tensor([False, False, True, False]),
    )
    with torch.no_grad():
        expected = ours(padded, torch.tensor(SIZES), targets)
        losses = ours(padded, torch.tensor(SIZES), [crowded, targets[1]])
    assert losses == expected


def test_anchors_stay_exact_under_autocast() -> None:
    # In bfloat16 a coordinate of 500 px would be off by up to 2 px, and the boxes decoded from it with it.
    detector = detectors.build("retinanet", _trunk("resnet_small", width=16), 3, fpn_channels=16, anchor_sizes=(32, 64))
    images, sizes = torch.zeros(1, 3, 64, 512), torch.tensor([[64, 512]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, anchors, counts = detector._predict(images, sizes)
    assert {output.dtype for output in outputs.values()} == {torch.float32}
    assert counts == [8 * 64 * 9, 4 * 32 * 9]
    # Square anchors of the smallest size, in the first row: centres 8 px apart.
    squares = anchors[0][: 64 * 9].reshape(64, 9, 4)[:, 3]
    centres = (squares[:, 0] + squares[:, 2]) / 2
    assert anchors[0].dtype == torch.float32
    assert centres.tolist() == [8.0 * column for column in range(64)]
    assert (squares[:, 2] - squares[:, 0]).tolist() == [32.0] * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_sizes": ()}, "anchor_sizes"),
        ({"anchor_sizes": (0, 4)}, "anchor_sizes"),
        ({"anchor_sizes": "wide"}, "anchor_sizes"),
        ({"fg_iou_thresh": 0.3}, r"bg_iou_thresh 0.4 is more than fg_iou_thresh 0.3"),
        ({"score_thresh": 5}, "score_thresh"),
        ({"fpn_channels": 10**9}, "fpn_channels"),
    ],
)
def test_options_that_cannot_be_are_errors(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detectors.build("retinanet", _trunk("resnet_small", width=16), 3, **options)
