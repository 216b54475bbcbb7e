"""SOLOv2 as a whole: the published sizes, and that it can learn a few images by heart."""

import io
import math
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipelines.instances import Instances
from service.config import ModelConfig
from service.errors import ConfigError
from service.models import build as build_classifier
from service.models import detectors
from service.models.detections import Detections
from service.models.heads import Classifier
from service.models.solov2.branches import MaskBranch, coordinates, to_head_strides
from tests.service.drawn_objects import draw

SMALL = {
    "fpn_channels": 32,
    "head_channels": 32,
    "head_convs": 2,
    "mask_channels": 16,
    "kernel_channels": 16,
    "grids": (10, 8, 6, 4, 2),
    "scale_ranges": ((1, 24), (12, 48), (24, 64), (48, 96), (64, 256)),
}


def _trunk(name: str, **options: object) -> Classifier:
    return build_classifier(ModelConfig.model_validate({"name": name, **options}), 5, 0)


def test_levels_grids_and_mask_features_have_the_published_sizes() -> None:
    with torch.device("meta"):
        detector = detectors.build("solov2", _trunk("resnet50"), 80)
        images = torch.zeros(2, 3, 800, 1344)
    levels = list(detector.backbone(images).values())
    seen = [(-(-800 // maps.shape[2]), -(-1344 // maps.shape[3])) for maps in to_head_strides(levels)]
    assert seen == [(8, 8), (8, 8), (16, 16), (32, 32), (32, 32)]
    logits, kernels, features = detector._predict(images)
    assert [tuple(level.shape) for level in logits] == [(2, 80, side, side) for side in (40, 36, 24, 16, 12)]
    assert kernels.shape == (2, 40**2 + 36**2 + 24**2 + 16**2 + 12**2, 256)
    assert features.shape == (2, 256, 200, 336)


def test_weights_are_as_many_as_the_published_architecture_has() -> None:
    with torch.device("meta"):
        detector = detectors.build("solov2", _trunk("resnet50"), 80)

    def count(part: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    # Convolutions of the towers have no bias; each GroupNorm has a scale and a shift a channel.
    tower = 3 * 512 * 512 * 9 + 4 * 2 * 512
    kernel = (256 + 2) * 512 * 9 + tower + 512 * 256 * 9 + 256
    classes = 256 * 512 * 9 + tower + 512 * 80 * 9 + 80
    assert count(detector.grid_head) == kernel + classes
    # P2 one convolution, P3 one, P4 two, P5 three, the first of them with coordinates; then 1 x 1 to 256.
    mask = 9 * 128 * (4 * 256 + 2 + 3 * 128) + 7 * 2 * 128 + 128 * 256 + 2 * 256
    assert count(detector.mask_branch) == mask
    pyramid = 256 * (256 + 512 + 1024 + 2048) + 4 * 256 + 4 * (256 * 256 * 9 + 256)
    assert count(detector.backbone.fpn) == pyramid
    groups = {module.num_groups for module in detector.modules() if isinstance(module, torch.nn.GroupNorm)}
    assert groups == {32}


def test_coordinates_run_from_minus_1_to_1_x_before_y() -> None:
    places = coordinates(torch.zeros(2, 5, 3, 5))
    assert places.shape == (2, 2, 3, 5)
    assert places[1, 0].tolist() == [[-1, -0.5, 0, 0.5, 1]] * 3
    assert places[1, 1].T.tolist() == [[-1, 0, 1]] * 5


def test_the_mask_branch_adds_up_all_four_levels_at_the_size_of_the_first() -> None:
    branch = MaskBranch(6, 8, 4)
    levels = [torch.randn(2, 6, 32 // 2**level, 48 // 2**level, requires_grad=True) for level in range(4)]
    features = branch(levels)
    assert features.shape == (2, 4, 32, 48)
    assert features.min() == 0
    for maps in torch.autograd.grad(features.square().sum(), levels):
        assert maps.abs().sum() > 0


def test_classes_start_at_a_probability_of_a_hundredth_so_nothing_is_found_before_training() -> None:
    torch.manual_seed(0)
    detector = detectors.build("solov2", _trunk("resnet_small", width=16), 3, **SMALL)
    logits = detector._predict(torch.randn(1, 3, 64, 96)).logits
    assert torch.cat([level.flatten() for level in logits]).mean().item() == pytest.approx(-math.log(99), abs=0.1)
    (found,) = detector(torch.randn(1, 3, 64, 96), torch.tensor([[50, 90]]))
    assert found.boxes.shape == (0, 4)
    assert found.masks.shape == (0, 50, 90)


def test_the_loss_is_the_focal_loss_and_three_times_the_dice_loss() -> None:
    images, targets = draw(2, side=64)
    torch.manual_seed(0)
    detector = detectors.build("solov2", _trunk("resnet_small", width=16), 3, **SMALL)
    sizes = torch.full((2, 2), 64)
    losses = detector(images, sizes, targets)
    torch.testing.assert_close(losses["loss"], losses["class_loss"] + 3 * losses["mask_loss"])
    # Dice of a mask that is 1/2 everywhere, and of one that is right, are its limits at the start.
    assert 0.2 < losses["mask_loss"] < 1


def test_targets_without_masks_and_odd_sizes_are_errors() -> None:
    detector = detectors.build("solov2", _trunk("resnet_small", width=16), 3, **SMALL)
    images, targets = draw(1, side=64)
    without = targets[0]._replace(masks=torch.zeros(0, 0, 0, dtype=torch.uint8))
    with pytest.raises(ValueError, match="3 objects and 0 masks"):
        detector(images, torch.tensor([[64, 64]]), [without])
    with pytest.raises(ValueError, match="48 x 64 px; SOLOv2 needs sides that are multiples of 32"):
        detector(images[:, :, :48], torch.tensor([[48, 64]]))


@pytest.mark.parametrize(
    "options",
    [
        {"grids": (8, 4)},
        {"grids": (0, 1, 1, 1, 1)},
        {"grids": "many"},
        {"scale_ranges": ((9, 1),) * 5},
        {"scale_ranges": (1, 2, 3, 4, 5)},
        {"head_convs": 0},
    ],
)
def test_options_that_cannot_be_are_errors(options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        detectors.build("solov2", _trunk("resnet_small", width=16), 3, **options)


def _mask_ap(found: list[Detections], targets: list[Instances]) -> float:
    """COCO's AP over IoU 0.5 .. 0.95, by pycocotools."""
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": int(label),
            "segmentation": rle.encode(np.asfortranarray(mask.numpy())),
            "area": int(mask.sum()),
            "bbox": box.tolist(),
            "iscrowd": 0,
        }
        for number, (image, box, label, mask) in enumerate(
            (
                (image, *each)
                for image, target in enumerate(targets)
                for each in zip(target.boxes, target.labels, target.masks, strict=True)
            ),
            start=1,
        )
    ]
    results = [
        {
            "image_id": image,
            "category_id": int(label),
            "segmentation": rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8))),
            "score": float(score),
        }
        for image, one in enumerate(found)
        for score, label, mask in zip(one.scores, one.labels, one.masks, strict=True)
    ]
    with redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image, "height": 1, "width": 1} for image in range(len(targets))],
            "categories": [{"id": label} for label in range(3)],
            "annotations": annotations,
        }
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0])


def test_it_learns_8_images_by_heart() -> None:
    # Masks drawn at a quarter of the size cannot be better than AP 0.95 here, which needs 192 px.
    torch.manual_seed(0)
    images, targets = draw(8, side=192, objects=2, radii=(1 / 5, 1 / 3))
    options = {**SMALL, "fpn_channels": 16, "head_channels": 64, "grids": (12, 10, 8, 7, 6)}
    detector = detectors.build(
        *("solov2", _trunk("resnet_small", width=16), 3), **options, trainable_layers=4, frozen_batchnorm=False
    ).train()
    sizes, steps, rate = torch.full((8, 2), 192), 60, 6e-3
    optimizer = torch.optim.AdamW(detector.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        detector(images, sizes, targets)["loss"].backward()
        optimizer.step()
        schedule.step()
    assert _mask_ap(detector.eval()(images, sizes), targets) > 0.9
