"""A place to record in: real MLflow on SQLite, in the test's own folder."""

import shutil
from pathlib import Path

import pytest

from service import store


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database, made once (its migration takes seconds), by whichever process is first."""
    root = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each worker a folder below the session's.
    shared = root.parent if root.name.startswith("popen-") else root
    path = shared / "empty-mlflow.db"
    store.ensure_ready(f"sqlite:///{path}")
    return path


@pytest.fixture
def place(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The default tracking URI, ready, with the test's folder as the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("LOROT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_database, tmp_path / "mlruns" / "mlflow.db")
    return store.default_uri()
