"""What several files of tests start once each: a Docker engine, a browser, a service with jobs to look at."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from service import store

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.integration.engine import Engine
    from tests.integration.live_console import Console


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

    try:
        return engines.running()
    except engines.RefusedError as error:
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
