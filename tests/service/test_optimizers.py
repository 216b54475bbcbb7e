"""Parameter groups; SGD and AdamW are torch's; LAMB against a hand-worked step and the paper's algorithm in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from service.config import ConfigError, ModelConfig, OptimizerConfig, resolve
from service.models import build as build_model
from service.training.optimizers import Lamb, build, parameter_groups


def _config(**values: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate(values)


def test_only_weights_of_convolutions_and_linear_layers_decay() -> None:
    model = build_model(ModelConfig(name="resnet_small"), 10, 16)
    decayed, free = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    kinds = {type(modules[names[id(parameter)].rpartition(".")[0]]) for parameter in decayed["params"]}
    assert kinds == {nn.Conv2d, nn.Linear}
    assert all(names[id(parameter)].endswith(".weight") for parameter in decayed["params"])
    expected = {name for name in names.values() if name.endswith("bias") or "bn" in name or "downsample.1" in name}
    assert {names[id(parameter)] for parameter in free["params"]} == expected
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    (group,) = parameter_groups(layer, 0.1)
    assert group["params"] == [layer.weight]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_follows_nesterovs_rule_by_hand(momentum: float) -> None:
    weight = nn.Parameter(torch.tensor([[2.0]]))
    groups = [{"params": [weight], "weight_decay": 0.1}]
    optimizer = build(_config(name="sgd", lr=0.5, momentum=momentum), groups)
    value, velocity = 2.0, 0.0
    for gradient in (1.0, -3.0):
        weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        total = gradient + 0.1 * value
        velocity = momentum * velocity + total
        value -= 0.5 * (total + momentum * velocity)
        assert weight.item() == pytest.approx(value)


def test_adamw_decouples_weight_decay() -> None:
    weight = nn.Parameter(torch.tensor([[2.0]]))
    optimizer = build(_config(name="adamw", lr=0.5), [{"params": [weight], "weight_decay": 0.1}])
    weight.grad = torch.tensor([[7.0]])
    optimizer.step()
    # The first step's m / sqrt(v) is the gradient's sign; decay is lr * 0.1 * weight, apart from it.
    assert weight.item() == pytest.approx(2.0 - 0.5 * 0.1 * 2.0 - 0.5, abs=1e-5)


def test_a_lamb_step_worked_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    weight.grad = torch.tensor([[10.0, -0.5]])
    Lamb([weight], lr=0.1, weight_decay=0.5).step()
    # After one step both moments are unbiased: r = sign(g). r + 0.5 x = (2.5, 1), of norm sqrt(7.25); |x| = 5.
    update = np.array([2.5, 1.0]) * 5 / np.sqrt(7.25)
    np.testing.assert_allclose(weight.detach().numpy()[0], np.array([3.0, 4.0]) - 0.1 * update, rtol=1e-5)


def _lamb_in_numpy(x: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, adapt: bool) -> np.ndarray:
    """Algorithm 2 of You et al. 2020, phi the identity, line by line in float64."""
    beta1, beta2, eps = 0.9, 0.999, 1e-6
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        r = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        update = r + decay * x
        ratio = np.linalg.norm(x) / np.linalg.norm(update) if adapt else 1.0
        x = x - lr * ratio * update
    return x


def test_lamb_is_the_papers_algorithm_over_many_steps_and_layers() -> None:
    rng = np.random.default_rng(0)
    shapes = [(8, 3, 3, 3), (5, 8), (8,)]
    starts = [rng.normal(size=shape) for shape in shapes]
    gradients = [[rng.normal(size=shape) for _ in range(20)] for shape in shapes]
    layers = [nn.Parameter(torch.tensor(start)) for start in starts]
    groups = [{"params": layers[:2], "weight_decay": 0.1}, {"params": layers[2:], "weight_decay": 0.0}]
    optimizer = build(_config(name="lamb", lr=0.02), groups)
    for step in range(20):
        for layer, drawn in zip(layers, gradients, strict=True):
            layer.grad = torch.tensor(drawn[step])
        optimizer.step()
    for index, layer in enumerate(layers):
        decay, adapt = (0.1, True) if index < 2 else (0.0, False)
        expected = _lamb_in_numpy(starts[index], gradients[index], 0.02, decay, adapt)
        np.testing.assert_allclose(layer.detach().numpy(), expected, rtol=1e-6, atol=1e-9)


def test_lamb_moves_weights_that_start_at_zero_and_leaves_those_without_gradient() -> None:
    zero, idle = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([zero, idle], lr=0.1)
    zero.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1))
    assert torch.equal(idle.detach(), torch.ones(2, 2))
    idle.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(idle.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_an_optimizer_continued_from_its_state_takes_bit_identical_steps(name: str) -> None:
    def run(steps: range, layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        for step in steps:
            layer.weight.grad = torch.full_like(layer.weight, 0.1 * (step + 1)) * layer.weight.detach().cos()
            layer.bias.grad = torch.full_like(layer.bias, -0.2)
            optimizer.step()

    torch.manual_seed(0)
    whole, halved = nn.Linear(4, 3), nn.Linear(4, 3)
    halved.load_state_dict(whole.state_dict())
    run(range(6), whole, build(_config(name=name), parameter_groups(whole, 0.1)))
    first = build(_config(name=name), parameter_groups(halved, 0.1))
    run(range(3), halved, first)
    second = build(_config(name=name), parameter_groups(halved, 0.1))
    second.load_state_dict(first.state_dict())
    run(range(3, 6), halved, second)
    assert torch.equal(whole.weight, halved.weight)
    assert torch.equal(whole.bias, halved.bias)


def test_lamb_keeps_its_state_as_tensors_of_the_parameters_shape() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = Lamb([weight])
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    state = optimizer.state[weight]
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "step": (),
        "exp_avg": (3, 2),
        "exp_avg_sq": (3, 2),
    }
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lamb_on_partitioned_weights_is_refused(stage: int) -> None:
    values = {"data": {"name": "folder"}, "optimizer": {"name": "lamb"}}
    with pytest.raises(ConfigError, match=r"zero_stage: \d cuts weights into flat pieces, but lamb"):
        resolve({**values, "zero_stage": stage})
    assert resolve({**values, "zero_stage": 0}).optimizer.name == "lamb"
