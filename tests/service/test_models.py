"""Networks: torchvision's to the bit, heads beside each other, and the small one's shape and size."""

import pytest
import torch
from torchvision.models import resnet as torchvision_resnet

from service.config import ModelConfig
from service.models import Classifier, build

NAMES = ("resnet18", "resnet50", "cifar_resnet18", "resnet_small")


def _images(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def _build(name: str, num_classes: int = 10, num_pretext: int = 16, **options: object) -> Classifier:
    return build(ModelConfig.model_validate({"name": name, **options}), num_classes, num_pretext)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_imagenet_resnets_take_torchvision_weights_and_give_torchvision_logits(name: str) -> None:
    oracle = getattr(torchvision_resnet, name)(weights=None, num_classes=7).eval()
    model = _build(name, num_classes=7, num_pretext=0).eval()
    assert list(model.state_dict()) == list(oracle.state_dict())
    model.load_state_dict(oracle.state_dict())
    with torch.no_grad():
        assert torch.equal(model(_images()).logits, oracle(_images()))


def test_cifar_resnet_is_torchvisions_with_another_stem() -> None:
    oracle = torchvision_resnet.resnet18(weights=None, num_classes=10)
    oracle.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    oracle.maxpool = torch.nn.Identity()
    model = _build("cifar_resnet18", num_pretext=0)
    model.load_state_dict(oracle.state_dict())
    images = _images(side=32)
    assert torch.equal(model(images).logits, oracle(images))
    assert model.features(images).shape == (2, 512, 4, 4)
    # He et al.'s initialisation of the new stem: variance 2 / (9 * 64).
    torch.manual_seed(0)
    stem = _build("cifar_resnet18").state_dict()["conv1.weight"]
    assert stem.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_head_applied_to_the_mean_of_the_features(name: str) -> None:
    model = _build(name).eval()
    with torch.no_grad():
        maps = model.features(_images())
        outputs = model(_images())
        assert outputs.logits.shape == (2, 10)
        assert outputs.pretext_logits is not None
        assert outputs.pretext_logits.shape == (2, 16)
        assert model.pretext_fc is not None
        torch.testing.assert_close(outputs.logits, model.fc(maps.mean((2, 3))))
        torch.testing.assert_close(outputs.pretext_logits, model.pretext_fc(maps.mean((2, 3))))


@pytest.mark.parametrize("name", NAMES)
def test_a_pretext_head_adds_two_keys_and_changes_no_other_initial_weight(name: str) -> None:
    torch.manual_seed(3)
    without = _build(name, num_pretext=0).eval()
    torch.manual_seed(3)
    with_head = _build(name).state_dict()
    assert without.pretext_fc is None
    assert without(_images()).pretext_logits is None
    assert set(with_head) - set(without.state_dict()) == {"pretext_fc.weight", "pretext_fc.bias"}
    assert all(torch.equal(with_head[key], value) for key, value in without.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_input_gives_the_same_logits_and_channels_last_maps(name: str) -> None:
    model = _build(name).eval()
    images = _images().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert model.features(images).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images).logits, model(_images()).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet18", "resnet_small"])
def test_zero_init_makes_every_residual_block_start_as_its_shortcut(name: str) -> None:
    state = _build(name, zero_init=True).state_dict()
    last = "bn3.weight" if name == "resnet50" else "bn2.weight"
    gammas = [value for key, value in state.items() if key.endswith(last)]
    assert gammas
    assert not any(gamma.any() for gamma in gammas)
    assert all(value.all() for key, value in state.items() if key.endswith("bn1.weight"))
    assert all(value.all() for key, value in _build(name).state_dict().items() if key.endswith(last))


@pytest.mark.parametrize("width", [16, 32, 64])
def test_the_small_network_gives_8_by_8_maps_at_64_pixels(width: int) -> None:
    model = _build("resnet_small", width=width)
    assert model.features(_images()).shape == (2, 4 * width, 8, 8)
    assert model.layer1[0].bn1.num_features == width


def test_the_small_networks_size_is_what_its_docstring_says() -> None:
    # Multiply-adds by hand, at 64 px: output pixels x inputs x outputs x kernel, stage by stage with its shortcut.
    stem = 32**2 * 3 * 16 * 9
    first = 16**2 * (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32)
    second = 8**2 * (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64)
    third = 8**2 * (64 * 128 * 9 + 128 * 128 * 9 + 64 * 128)
    model = _build("resnet_small", num_pretext=0)
    counted = 0

    def count(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal counted
        assert isinstance(module, torch.nn.Conv2d)
        counted += module.weight.numel() * output.shape[2] * output.shape[3]

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    model(_images())
    assert counted == stem + first + second + third
    assert round(counted / 1e6, 1) == 22.5
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e3) == 304


def test_every_parameter_of_both_heads_and_the_trunk_gets_a_gradient() -> None:
    model = _build("resnet_small")
    outputs = model(_images())
    (outputs.logits.sum() + outputs.pretext_logits.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_network_traces_into_one_graph() -> None:
    model = _build("resnet_small").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(_images()).logits, model(_images()).logits)
