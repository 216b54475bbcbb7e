"""Learning rates against torch's own schedulers, step by step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from service.config import ScheduleConfig
from service.training.schedule import learning_rate

TOTAL = 40
SIZES = {"samples_per_epoch": 100, "global_batch": 10}


def _config(**values: object) -> ScheduleConfig:
    return ScheduleConfig.model_validate(values)


def _rates(config: ScheduleConfig, peak: float = 0.4, total: int = TOTAL) -> list[float]:
    return [learning_rate(config, peak, step, total, **SIZES) for step in range(total)]


def _torch_rates(make: object, peak: float = 0.4, total: int = TOTAL) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = make(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _after_warmup(warmup: int, make: object) -> object:
    def chain(optimizer: torch.optim.Optimizer) -> object:
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        return lr_scheduler.SequentialLR(optimizer, [rise, make(optimizer)], milestones=[warmup])  # type: ignore[operator]

    return chain


def test_cosine_with_warmup_is_torchs_linear_then_cosine() -> None:
    expected = _torch_rates(_after_warmup(5, lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL - 5, eta_min=0.04)))
    assert _rates(_config(name="cosine", warmup="5 steps", final=0.1)) == pytest.approx(expected)


def test_linear_with_warmup_is_torchs_linear_twice() -> None:
    make = _after_warmup(4, lambda o: lr_scheduler.LinearLR(o, 1.0, end_factor=0.2, total_iters=TOTAL - 4))
    assert _rates(_config(name="linear", warmup="4 steps", final=0.2)) == pytest.approx(_torch_rates(make))


def test_step_is_torchs_multi_step_and_milestones_count_from_the_start() -> None:
    expected = _torch_rates(lambda o: lr_scheduler.MultiStepLR(o, [20, 30], gamma=0.1))
    config = _config(name="step", warmup="0 steps", milestones=["2 epochs", "75 %"], gamma=0.1)
    assert _rates(config) == pytest.approx(expected)
    warmed = _rates(_config(name="step", warmup="3 steps", milestones=["2 epochs", "75 %"], gamma=0.1))
    assert warmed[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert warmed[3:] == pytest.approx(expected[3:])


@pytest.mark.parametrize("final", [0.0, 0.001])
@pytest.mark.parametrize("warmup", [2, 12, 39])
def test_one_cycle_is_torchs(warmup: int, final: float) -> None:
    expected = _torch_rates(
        lambda o: lr_scheduler.OneCycleLR(
            o,
            max_lr=0.4,
            total_steps=TOTAL + 1,
            pct_start=warmup / (TOTAL + 1),
            cycle_momentum=False,
            final_div_factor=1 / (25 * final) if final else float("inf"),
        ),
        total=TOTAL,
    )
    config = _config(name="one_cycle", warmup=f"{warmup} steps", final=final)
    rates = [learning_rate(config, 0.4, step, TOTAL + 1, **SIZES) for step in range(TOTAL)]
    assert rates == pytest.approx(expected)


def test_warmup_may_be_given_in_any_unit() -> None:
    units = ("4 steps", "10 %", "40 samples", "0.4 epochs")
    rates = [_rates(_config(name="cosine", warmup=warmup)) for warmup in units]
    assert all(other == rates[0] for other in rates)
    assert rates[0][:5] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4])


@given(
    name=st.sampled_from(["cosine", "step", "linear", "one_cycle"]),
    warmup=st.integers(0, 60),
    total=st.integers(1, 50),
    final=st.floats(0, 1),
    peak=st.floats(1e-6, 10),
)
def test_no_rate_is_negative_or_above_the_peak(name: str, warmup: int, total: int, final: float, peak: float) -> None:
    config = _config(name=name, warmup=f"{warmup} steps", milestones=["50 %"], final=final)
    rates = _rates(config, peak, total)
    assert all(0 <= rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[0] > 0


def test_a_step_beyond_the_end_has_the_last_ones_rate() -> None:
    for name in ("cosine", "step", "linear", "one_cycle"):
        config = _config(name=name, milestones=["50 %"])
        assert learning_rate(config, 1.0, TOTAL + 5, TOTAL, **SIZES) == _rates(config, 1.0)[-1]
