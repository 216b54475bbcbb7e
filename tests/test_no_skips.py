"""Where LOROT_NO_SKIPS is set no integration test is left out in silence."""

import shutil
import types
from pathlib import Path
from typing import Any

import pytest

from tests.integration import composition, conftest
from tests.integration.engine import ROOT, Engine


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
    ("switch", "outcome", "reason"), [("", "skipped", "Skipped: no Docker engine"), ("1", "passed", "")]
)
def test_elsewhere_and_what_has_run_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, switch: str, outcome: str, reason: str
) -> None:
    assert told(monkeypatch, switch, outcome, reason).outcome == outcome


def test_the_workers_image_is_left_out_where_the_disk_has_no_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=composition.WORKER_NEEDS - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    needed = f"{composition.WORKER_NEEDS / 1e9:.0f}"
    assert f"want {needed} GB free" in (ROOT / "docker/README.md").read_text()
    with pytest.raises(pytest.skip.Exception, match=f"{needed} are needed"):
        composition.build_worker(Engine("unix:///nowhere", tmp_path))
    # What is there already takes no more.
    there = Engine("unix:///nowhere", tmp_path, images={"lorot-built-worker"})
    assert composition.build_worker(there) == "lorot-built-worker"
