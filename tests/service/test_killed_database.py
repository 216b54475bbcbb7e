"""A SQLite record whose writer was killed in the middle of a transaction, and one that somebody else keeps locked."""

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from service import store
from service.operations import database

# The cache holds too little for it, so pages of the file itself are changed, and the journal beside it is needed.
KILLED = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN")
connection.execute("DELETE FROM experiments")
connection.executemany(
    "INSERT INTO experiments (experiment_id, name, lifecycle_stage, workspace) VALUES (?, ?, 'active', 'default')",
    [(number, f"{number}" * 100) for number in range(100, 200)],
)
os.kill(os.getpid(), signal.SIGKILL)
"""


def interrupted(path: Path) -> Path:
    """Kill a writer of this database; returns the journal that it has left."""
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    journal = path.with_name(f"{path.name}-journal")
    assert journal.stat().st_size > 0
    assert path.read_bytes() != before, "nothing is left in the middle"
    return journal


def names(uri: str) -> list[str]:
    return [one.name for one in store.client(uri).search_experiments()]


def experiments(path: Path) -> set[str]:
    """As a new process reads them: MLflow keeps its connection, to whatever file that was."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        return {name for (name,) in database.execute("SELECT name FROM experiments")}


def test_a_database_whose_writer_was_killed_is_as_it_was_before_and_opens(place: str, tmp_path: Path) -> None:
    journal = interrupted(tmp_path / "mlruns" / "mlflow.db")
    store.ensure_ready(place)
    assert not journal.exists()
    assert names(place) == ["Default"]


def test_a_backup_of_a_database_whose_writer_was_killed_holds_what_was_there_before(place: str, tmp_path: Path) -> None:
    interrupted(tmp_path / "mlruns" / "mlflow.db")
    database.dump(store.absolute(place), tmp_path / "copy.db")
    assert names(f"sqlite:///{tmp_path / 'copy.db'}") == ["Default"]


def test_a_database_that_somebody_keeps_locked_is_not_there_now_and_not_to_be_moved_away(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_LOCKED_S", 0.1)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlruns" / "mlflow.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(store.UnreachableError, match=r"locked for 0\.1 seconds"):
            store.ensure_ready(place)
    store.ensure_ready(place)


def test_a_database_that_is_a_folder_is_said_to_be_unreadable(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").mkdir()
    with pytest.raises(store.TrackingError, match="cannot be read"):
        store.ensure_ready(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_new_database_gets_nothing_of_one_that_was_moved_away_nor_of_one_that_was_never_finished(
    place: str, tmp_path: Path
) -> None:
    store.client(place).create_experiment("earlier")
    path = tmp_path / "mlruns" / "mlflow.db"
    journal = interrupted(path)
    kept = journal.read_bytes()
    path.rename(tmp_path / "away.db")
    (tmp_path / "mlruns" / ".creating-abcdefgh.making").mkdir()
    store.ensure_ready(place)
    assert experiments(path) == {"Default"}
    assert {one.name for one in path.parent.iterdir()} == {"mlflow.db", ".mlflow.db.lock", "mlflow.db-journal.old"}
    # Beside the one that it belongs to it is of use again.
    (tmp_path / "away.db-journal").write_bytes(kept)
    assert experiments(tmp_path / "away.db") == {"Default", "earlier"}
