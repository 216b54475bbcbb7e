"""The feature pyramid: on which layers it stands, what of them learns, and which trunks it refuses."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from service.config import ModelConfig
from service.errors import CheckpointError, ConfigError
from service.models import Classifier, build, pyramid
from service.models.pyramid import Stage

OPTIONS = {"finest": 8, "num_levels": 5, "channels": 16, "coarser": "convolved", "trainable_layers": 3}


def _trunk(name: str, **options: object) -> Classifier:
    return build(ModelConfig.model_validate({"name": name, **options}), 5, 4)


def _pyramid(trunk: Classifier, **options: object) -> nn.Module:
    return pyramid.build(trunk, **{**OPTIONS, "frozen_batchnorm": True, **options})


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet50", [("layer1", 256, 4), ("layer2", 512, 8), ("layer3", 1024, 16), ("layer4", 2048, 32)]),
        ("resnet18", [("layer1", 64, 4), ("layer2", 128, 8), ("layer3", 256, 16), ("layer4", 512, 32)]),
        ("cifar_resnet18", [("layer1", 64, 1), ("layer2", 128, 2), ("layer3", 256, 4), ("layer4", 512, 8)]),
        ("resnet_small", [("layer1", 32, 4), ("layer2", 64, 8), ("layer3", 128, 8)]),
    ],
)
def test_channels_and_strides_of_a_trunk_are_found_without_knowing_it(name: str, stages: list[tuple]) -> None:
    assert pyramid.feature_stages(_trunk(name)) == [Stage(*stage) for stage in stages]


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet18", "resnet_small"])
@pytest.mark.parametrize(("finest", "coarser"), [(8, "convolved"), (4, "subsampled")])
def test_every_trunk_gives_five_levels_each_half_the_size_of_the_one_before(
    name: str, finest: int, coarser: str
) -> None:
    levels = _pyramid(_trunk(name), finest=finest, coarser=coarser)(torch.randn(1, 3, 128, 192))
    assert [tuple(level.shape) for level in levels.values()] == [
        (1, 16, -(-128 // stride), -(-192 // stride)) for stride in (finest * 2**k for k in range(5))
    ]


def test_it_is_torchvisions_pyramid_with_torchvisions_frozen_layers() -> None:
    oracle = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3).eval()
    trunk = _trunk("resnet18")
    ours = _pyramid(trunk, finest=4, coarser="subsampled", channels=256).eval()
    assert list(ours.state_dict()) == list(oracle.state_dict())
    learning = {name for name, parameter in oracle.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in ours.named_parameters() if parameter.requires_grad} == learning
    ours.load_state_dict(oracle.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for one, other in zip(ours(images).values(), oracle(images).values(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_as_many_stages_learn_as_torchvision_lets_learn(count: int) -> None:
    oracle = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=count, norm_layer=nn.BatchNorm2d
    )
    ours = _pyramid(_trunk("resnet18"), finest=4, trainable_layers=count, frozen_batchnorm=False)
    assert {name for name, parameter in ours.body.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in oracle.body.named_parameters() if parameter.requires_grad
    }


def test_the_body_computes_the_trunks_features_and_leaves_the_trunk_alone() -> None:
    trunk = _trunk("resnet_small", width=16).train()
    for _ in range(3):
        trunk(torch.randn(8, 3, 64, 64))
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    body = _pyramid(trunk).body.train()
    images = torch.randn(2, 3, 64, 64)
    # Frozen: what it has learnt is used and kept, in training too.
    torch.testing.assert_close(body(images)["0"], trunk.eval().features(images))
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in body.modules()) == 10
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    assert all(parameter.requires_grad for parameter in trunk.parameters())
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())


def test_batchnorm_learns_on_if_it_is_not_frozen() -> None:
    body = _pyramid(_trunk("resnet_small", width=16), frozen_batchnorm=False).body
    before = body.layer3[0].bn1.running_mean.clone()
    body.train()(torch.randn(4, 3, 64, 64))
    assert not torch.equal(body.layer3[0].bn1.running_mean, before)


def test_a_trunk_without_maps_where_the_pyramid_begins_is_refused_with_its_layers_and_shapes() -> None:
    trunk = _trunk("resnet_small", width=16)
    del trunk.layer2, trunk.layer3
    with pytest.raises(CheckpointError, match=r"no feature maps at 1/8 .* layer1 \(16 channels at 1/4\)"):
        _pyramid(trunk)
    with pytest.raises(CheckpointError, match=r"1/64 .* layer2 \(128 channels at 1/8\), layer3"):
        _pyramid(_trunk("resnet18"), finest=64)


def test_a_trunk_without_stages_is_refused_with_what_it_has() -> None:
    trunk = Classifier({"stem": nn.Conv2d(3, 8, 3), "blocks": nn.Identity()}, 8, 5, 0)
    with pytest.raises(CheckpointError, match=r"no stages layer1, layer2, .*it has stem, blocks, fc"):
        _pyramid(trunk)


def test_a_trunk_whose_layers_do_not_fit_each_other_is_refused_with_the_layer_and_the_shape() -> None:
    trunk = _trunk("resnet_small", width=16)
    trunk.layer2 = _trunk("resnet_small", width=32).layer2
    with pytest.raises(CheckpointError, match=r"layer2 does not take maps of shape \(1, 16, 64, 64\)"):
        _pyramid(trunk)


@pytest.mark.parametrize("count", [-1, 5])
def test_more_learning_layers_than_there_are_is_an_error_that_says_how_many_there_are(count: int) -> None:
    with pytest.raises(ConfigError, match=rf"trainable_layers: {count} is not in 0 .. 4: .* layer1, layer2, layer3"):
        _pyramid(_trunk("resnet_small", width=16), trainable_layers=count)
