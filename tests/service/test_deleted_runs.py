"""What deleted runs keep of artifacts: told with sizes, and the command that is told removes that and nothing else."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service import run_creation, store
from service.cli import app
from service.operations import deleted_runs
from service.operations.deleted_runs import Deleted

DAY_S = 86400.0


@pytest.fixture
def uri(place: str) -> str:
    return store.absolute(place)


def run(uri: str, num_bytes: int = 0, experiment: str = "lorot", deleted: bool = True, days: float = 40) -> str:
    """A run that has ended so long ago, with an artifact of this size."""
    api = store.client(uri)
    run_id = run_creation.create_run(uri, experiment, "own")
    if num_bytes:
        api.log_text(run_id, "x" * num_bytes, "below/text.txt")
    api.set_terminated(run_id, "FINISHED", int(1000 * (time.time() - days * DAY_S)))
    if deleted:
        api.delete_run(run_id)
    return run_id


def find(uri: str, **more: object) -> Deleted:
    return deleted_runs.find(uri, (), older_than_s=30 * DAY_S, **more)  # type: ignore[arg-type]


def removed_by(command: str) -> str:
    """What MLflow says when the command is given."""
    program, *arguments = shlex.split(command)
    assert program == "mlflow"
    # In a process of its own: it sets MLFLOW_TRACKING_URI for all that comes after it.
    done = subprocess.run([sys.executable, "-m", "mlflow", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_told_is_what_the_command_removes_and_nothing_else(uri: str, tmp_path: Path) -> None:
    first, second = run(uri, 1000), run(uri, 24)
    run(uri, 0), run(uri, 5, days=3)
    alive = run(uri, 7, deleted=False)
    found = find(uri)
    assert [(one.id, one.num_bytes) for one in found.runs] == [(first, 1000), (second, 24)]
    assert found.num_bytes == 1024
    assert found.notes == []
    before = {path.read_text() for path in tmp_path.rglob("text.txt")}
    assert before == {"x" * size for size in (1000, 24, 5, 7)}
    (command,) = found.commands
    removed_by(command)
    assert {path.read_text() for path in tmp_path.rglob("text.txt")} == {"x" * size for size in (5, 7)}
    assert find(uri).runs == []
    assert store.client(uri).get_run(alive).info.lifecycle_stage == "active"


def test_models_foreign_places_and_what_a_job_reads_are_not_in_the_command(uri: str, tmp_path: Path) -> None:
    api = store.client(uri)
    model, needed, own = run(uri, 10), run(uri, 10), run(uri, 10)
    api.create_registered_model("m")
    api.create_model_version("m", f"runs:/{model}/below", None)
    api.create_experiment("trap", artifact_location=(tmp_path / "outside").as_uri())
    trapped = run(uri, 10, "trap")
    run(uri, 10, "other")
    found = find(uri, experiments=["lorot", "trap"], needed={needed})
    assert [one.id for one in found.runs] == [own]
    assert [own in line for line in found.commands] == [True]
    told = dict(line.split("; it stays")[0].removeprefix("deleted run ").split(" ", 1) for line in found.notes)
    assert told[model] == "keeps the registered model models:/m/1"
    assert told[needed] == "is named by a job that has not ended"
    assert "outside" in told[trapped]


def test_no_command_is_given_where_mlflow_would_remove_more(uri: str) -> None:
    api = store.client(uri)
    run(uri, 10)
    lately = run(uri, 10, "gone", days=1)
    api.delete_experiment(api.get_experiment_by_name("gone").experiment_id)
    found = find(uri)
    assert len(found.runs) == 1
    assert found.commands == []
    assert lately in found.notes[0]
    assert "mlflow experiments restore -x" in found.notes[0]


def test_a_server_s_command_leaves_its_database_open_and_shows_no_password() -> None:
    (line,) = deleted_runs._commands("http://mlflow.lan:5000", ["a", "b"])
    assert line == "mlflow gc --tracking-uri http://mlflow.lan:5000 --backend-store-uri DATABASE --run-ids a,b"
    (line,) = deleted_runs._commands("postgresql+psycopg2://me:hush@db.lan/x", ["a"])
    assert "hush" not in line
    assert "--backend-store-uri postgresql+psycopg2://me@db.lan/x" in line
    assert len(deleted_runs._commands("http://mlflow.lan:5000", [str(number) for number in range(501)])) == 2


def test_the_dry_run_tells_it(uri: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "jobs").mkdir(parents=True)
    own = run(uri, 2_000_000)
    done = CliRunner().invoke(app, ["gc", "--dry-run"], catch_exceptions=False)
    assert f"(deleted run {own}, own)" in done.output
    assert "1 deleted run keeps 2.000 MB of artifacts; they are MLflow's" in done.output
    assert f"mlflow gc --tracking-uri {uri} --backend-store-uri {uri} --run-ids {own}" in done.output
    assert find(uri).num_bytes == 2_000_000


def test_artifacts_that_cannot_be_looked_at_stay_and_are_told_of(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = run(uri, 10), run(uri, 20)
    measure = deleted_runs._measure

    def without_its_library(api: object, run_id: str) -> int:
        if run_id == own:
            raise ModuleNotFoundError("No module named 'boto3'")
        return measure(api, run_id)

    monkeypatch.setattr(deleted_runs, "_measure", without_its_library)
    found = find(uri)
    assert [one.id for one in found.runs] == [other]
    reason = "keeps artifacts that cannot be looked at (No module named 'boto3')"
    assert found.notes == [f"deleted run {own} {reason}; it stays"]
