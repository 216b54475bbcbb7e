"""What a training job says on a terminal that is none: a line now and then, with the time that is left."""

import io
from types import SimpleNamespace

import pytest

from service.training import console
from service.training.console import Display


def test_the_first_step_which_opens_data_and_compiles_counts_for_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    terminal = io.StringIO()
    display = Display(terminal, total_steps=50, first_step=20)
    # A minute for the first step, two seconds for each that follows.
    now[0] += 60
    display.step(21)
    for step in range(22, 51):
        now[0] += 2
        display.step(step)
    lines = terminal.getvalue().splitlines()
    assert lines[0] == "step 21/50"
    assert lines[1:] == [f"step {step}/50  {2 * (50 - step)} s left" for step in (26, 31, 36, 41, 46, 50)]
