"""What every detector must do: one table of all of them."""

from typing import Any

import pytest
import torch

from service.config import ModelConfig
from service.errors import ConfigError
from service.models import build as build_classifier
from service.models import detectors
from service.models.detections import Detections, Detector
from service.models.heads import Classifier
from tests.service.drawn_objects import draw, nothing

SMALL: dict[str, dict[str, Any]] = {
    "retinanet": {"fpn_channels": 16, "anchor_sizes": (16, 32, 64)},
    "solov2": {
        **{"fpn_channels": 16, "head_channels": 16, "head_convs": 2, "mask_channels": 16, "kernel_channels": 8},
        **{"grids": (10, 8, 6, 4, 2), "scale_ranges": ((1, 24), (12, 48), (24, 64), (48, 96), (64, 256))},
    },
}
SIZES = torch.tensor([[64, 64], [50, 60]])


@pytest.fixture(params=detectors.available())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _trunk() -> Classifier:
    return build_classifier(ModelConfig.model_validate({"name": "resnet_small", "width": 16}), 5, 4)


def _build(name: str, **options: Any) -> Detector:
    torch.manual_seed(0)
    return detectors.build(name, _trunk(), 3, **{**SMALL[name], "trainable_layers": 4, **options})


@pytest.mark.parametrize("option", ["name", "trunk", "num_classes"])
def test_an_option_with_the_name_of_an_argument_is_refused_as_any_other(name: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has no option '{option}'"):
        detectors.build(name, _trunk(), 3, **{**SMALL[name], option: 1})


def test_the_table_has_all_detectors() -> None:
    assert set(SMALL) == set(detectors.available())


@pytest.mark.parametrize("empty", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_losses_are_finite_and_reach_every_trainable_parameter_whatever_is_in_the_images(
    name: str, autocast: bool, empty: tuple[int, ...]
) -> None:
    detector = _build(name).train()
    images, targets = draw(2, side=64)
    targets = [nothing() if index in empty else target for index, target in enumerate(targets)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = detector(images, SIZES, targets)
    assert tuple(losses) == detectors.loss_names(name)
    for loss in losses.values():
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        assert loss.isfinite()
    losses["loss"].backward()
    for key, parameter in detector.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), key
            # The boxes' and the masks' branches have nothing to learn from images without objects; classes do.
            assert len(empty) == 2 or parameter.grad.any(), key


def test_autocast_changes_losses_by_rounding_only(name: str) -> None:
    detector = _build(name)
    images, targets = draw(2, side=64)
    with torch.no_grad():
        exact = detector(images, SIZES, targets)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = detector(images, SIZES, targets)
    for key, loss in exact.items():
        assert rounded[key].item() == pytest.approx(loss.item(), rel=0.03), key


def test_losses_and_detections_do_not_depend_on_train_or_eval(name: str) -> None:
    detector = _build(name)
    images, targets = draw(2, side=64)
    with torch.no_grad():
        assert detector.train()(images, SIZES, targets) == detector.eval()(images, SIZES, targets)
    assert [len(found.boxes) for found in detector.train()(images, SIZES)] == [0, 0]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_detections_lie_in_the_content_best_first(name: str, autocast: bool) -> None:
    few = {"detections_per_img": 7} if name == "retinanet" else {"max_per_image": 7}
    # Untrained, so everything is found everywhere, as soon as a probability of a hundredth is enough.
    thresholds = {"score_thresh": 0.001, **({} if name == "retinanet" else {"update_thresh": 0.0, "mask_thresh": 0.4})}
    detector = _build(name, **few, **thresholds)
    images, _ = draw(2, side=64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = detector(images, SIZES)
    assert len(found) == 2
    for one, (height, width) in zip(found, SIZES.tolist(), strict=True):
        assert isinstance(one, Detections)
        assert one.boxes.shape == (7, 4)
        assert one.boxes.dtype == one.scores.dtype == torch.float32
        assert not one.scores.requires_grad
        assert one.labels.dtype == torch.int64
        assert set(one.labels.tolist()) <= {0, 1, 2}
        assert (one.scores.diff() <= 0).all()
        assert (one.boxes[:, :2] >= 0).all()
        assert (one.boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert (one.boxes[:, 2:] >= one.boxes[:, :2]).all()
        if one.masks is not None:
            assert one.masks.shape == (7, height, width)
            assert one.masks.dtype == torch.bool


def test_images_that_are_channels_last_give_the_same(name: str) -> None:
    detector = _build(name)
    images, targets = draw(2, side=64)
    with torch.no_grad():
        expected = detector(images, SIZES, targets)
        losses = detector(images.contiguous(memory_format=torch.channels_last), SIZES, targets)
    for key, loss in expected.items():
        torch.testing.assert_close(losses[key], loss)


def test_what_is_frozen_stays_through_a_step(name: str) -> None:
    detector = _build(name, trainable_layers=2).train()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    images, targets = draw(2, side=64)
    detector(images, SIZES, targets)["loss"].backward()
    learning = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    torch.optim.SGD(learning, lr=0.1, weight_decay=0.1).step()
    same = {key for key, value in detector.state_dict().items() if torch.equal(value, before[key])}
    frozen = {
        key for key in before if key.startswith(("backbone.body.conv1", "backbone.body.layer1")) or ".bn" in key
    } | {key for key in before if key.startswith("backbone.body") and ".downsample.1" in key}
    assert same == frozen


def test_an_unknown_option_is_an_error_with_the_nearest_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has no option 'trainable_layer'; did you mean 'trainable_layers'"):
        detectors.build(name, _trunk(), 3, trainable_layer=3)
    with pytest.raises(ConfigError, match="there must be 1 at least"):
        detectors.build(name, _trunk(), 0)


def test_an_unknown_detector_is_an_error_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no detector 'yolo'; there are retinanet, solov2"):
        detectors.build("yolo", _trunk(), 3)
    with pytest.raises(ConfigError, match="no detector 'yolo'"):
        detectors.loss_names("yolo")
