"""The moving average: its recurrence by hand, buffers, and continuation."""

import pytest
import torch
from torch import nn

from service.training.ema import Ema


def _model(value: float, count: int = 0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.fill_(value)
        model[0].bias.fill_(-value)
        model[1].running_mean.fill_(10 * value)
        model[1].num_batches_tracked.fill_(count)
    return model


def test_weights_and_buffers_follow_the_recurrence_from_the_first_update() -> None:
    ema = Ema(_model(99.0), decay=0.75)
    expected = None
    for step, value in enumerate((1.0, 5.0, -3.0), start=1):
        ema.update(_model(value, count=step), step)
        expected = value if expected is None else 0.75 * expected + 0.25 * value
        assert ema.module[0].weight.item() == pytest.approx(expected)
        assert ema.module[1].running_mean.item() == pytest.approx(10 * expected)


def test_whole_number_buffers_are_the_models_own() -> None:
    ema = Ema(_model(0.0), decay=0.999)
    for step in (1, 2, 3):
        ema.update(_model(1.0, count=100 + step), step)
    assert ema.module[1].num_batches_tracked.item() == 103


def test_it_updates_only_at_every_kth_step() -> None:
    ema = Ema(_model(0.0), decay=0.5, every=3)
    for step in range(1, 8):
        ema.update(_model(float(step)), step)
    assert ema.module[0].weight.item() == pytest.approx(0.5 * 3 + 0.5 * 6)


def test_continuing_from_the_state_is_bit_identical() -> None:
    values = torch.randn(8, generator=torch.Generator().manual_seed(0)).tolist()
    whole, first = Ema(_model(0.0), decay=0.9), Ema(_model(0.0), decay=0.9)
    for step, value in enumerate(values, start=1):
        whole.update(_model(value, step), step)
    for step, value in enumerate(values[:4], start=1):
        first.update(_model(value, step), step)
    second = Ema(_model(7.0), decay=0.9)
    second.load_state_dict({key: tensor.clone() for key, tensor in first.state_dict().items()})
    for step, value in enumerate(values[4:], start=5):
        second.update(_model(value, step), step)
    assert whole.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(tensor, second.state_dict()[key]) for key, tensor in whole.state_dict().items())


def test_the_average_is_a_copy_that_leaves_the_model_alone_and_takes_no_gradient() -> None:
    model = _model(1.0)
    ema = Ema(model, decay=0.5)
    ema.update(model, 1)
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    assert ema.module[0].weight.item() == 1.0
    ema.update(model, 2)
    assert model[0].weight.item() == 2.0
    assert model[0].weight.requires_grad
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


def test_the_state_is_tensors_only() -> None:
    state = Ema(_model(1.0), decay=0.5).state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert {"n_averaged", "module.0.weight", "module.1.running_mean"} <= state.keys()
