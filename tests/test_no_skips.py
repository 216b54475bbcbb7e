"""Where LOROT_NO_SKIPS is set no integration test is left out in silence."""

import types
from typing import Any

import pytest

from tests.integration import conftest


def told(monkeypatch: pytest.MonkeyPatch, switch: str, outcome: Any, reason: str) -> pytest.TestReport:
    """What becomes of a test's report where LOROT_NO_SKIPS is `switch`."""
    monkeypatch.setenv("LOROT_NO_SKIPS", switch)
    place: Any = ("tests/integration/test_a.py", 1, reason)
    report = pytest.TestReport("test_a", ("tests/integration/test_a.py", 1, "test_a"), {}, outcome, place, "setup")
    hook: Any = conftest.pytest_runtest_makereport(types.SimpleNamespace(), types.SimpleNamespace())  # type: ignore[arg-type]
    next(hook)
    with pytest.raises(StopIteration) as ended:
        hook.send(report)
    assert ended.value.value is report
    return report


def test_what_is_left_out_fails_there_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    report = told(monkeypatch, "1", "skipped", "Skipped: no Docker engine: only root can start one")
    assert report.failed
    assert "no Docker engine: only root can start one" in str(report.longrepr)


@pytest.mark.parametrize(
    ("switch", "outcome", "reason"),
    [
        ("", "skipped", "Skipped: no Docker engine"),
        ("1", "passed", ""),
        ("1", "skipped", "Skipped: LOROT_BUILD_WORKER=1 builds it, of 8 GB; docker/README.md"),
    ],
)
def test_elsewhere_and_what_has_to_be_asked_for_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, switch: str, outcome: str, reason: str
) -> None:
    assert told(monkeypatch, switch, outcome, reason).outcome == outcome
