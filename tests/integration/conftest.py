"""What several files of tests start once each: a Docker engine, a browser, a service with jobs to look at."""

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from service import store

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.integration.engine import Engine
    from tests.integration.live_console import Console


# Where everything is there that tests stand on, so that one that is left out would hide a fault.
NO_SKIPS = "LOROT_NO_SKIPS"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With LOROT_NO_SKIPS a test that is left out has failed."""
    report = yield
    if os.environ.get(NO_SKIPS) and report.skipped and not hasattr(report, "wasxfail"):
        assert isinstance(report.longrepr, tuple), "file, line and reason of a test that was left out"
        report.outcome = "failed"
        report.longrepr = f"{report.longrepr[2]}\n{NO_SKIPS} is set: nothing may be left out"
    return report


@pytest.fixture(scope="session", autouse=True)
def quick_databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Records that the tests make here are copies of one: its migrations take five seconds."""
    made, make = tmp_path_factory.mktemp("record") / "mlflow.db", store._create_database

    def copied(path: Path) -> None:
        if not made.exists():
            make(made)
        beside = path.with_name(f".{path.name}.copy")
        shutil.copy(made, beside)
        beside.replace(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_create_database", copied)
        yield


@pytest.fixture(scope="module")
def engine() -> "Engine":
    from tests.integration import engine as engines
    from tests.integration.debian import RefusedError

    try:
        return engines.running()
    except RefusedError as error:
        pytest.skip(f"no Docker engine: {error}")


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    from tests.integration import browser

    with browser.launched() as launched:
        yield launched


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Console"]:
    from tests.integration.live_console import serving

    with serving(tmp_path_factory.mktemp("console")) as console:
        yield console


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")
