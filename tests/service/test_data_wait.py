"""When a training says that it waited for its data, and where it says so."""

import io
import json
from pathlib import Path

import pytest

from service import data_wait, report
from service.training.console import Display


def test_up_to_a_twentieth_of_the_time_nothing_is_said() -> None:
    assert [data_wait.explain(share) for share in (None, 0.0, 0.05)] == ["", "", ""]


def test_above_it_the_share_what_it_costs_and_the_command_are_named() -> None:
    said = data_wait.explain(0.2)
    # A fifth of the time waited for: without it the same work takes four fifths.
    assert "20.0%" in said
    assert "1.25 times" in said
    assert "lorot profile" in said


def test_the_median_is_taken_over_the_records_that_have_a_share() -> None:
    history = [{"train/data_wait_share": share} for share in (0.2, 0.5, 0.1)]
    assert data_wait.median([*history, {"val/top1": 0.9}]) == 0.2
    assert data_wait.median([{"val/top1": 0.9}]) is None


@pytest.mark.parametrize(("share", "said"), [(0.02, False), (0.3, True)])
def test_the_report_explains_a_share_that_matters(share: float, said: bool, tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "train/data_wait_share": share}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = report.write(tmp_path, tmp_path / "page.html").read_text()
    assert f"{share:.2%}" in page
    assert ("lorot profile" in page) is said


@pytest.mark.parametrize(("share", "said"), [(0.02, False), (0.3, True)])
def test_the_terminal_shows_a_share_that_matters_while_training(share: float, said: bool) -> None:
    terminal = io.StringIO()
    display = Display(terminal, total_steps=1)
    display.figures({"train/loss": 1.0, "train/data_wait_share": share})
    display.step(1)
    assert ("waiting for data 30%" in terminal.getvalue()) is said
