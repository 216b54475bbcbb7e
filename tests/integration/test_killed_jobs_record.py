"""What MLflow shows of a training job that is killed hard, once with and once without its launcher, and goes on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from record_jobs import lines_of, lorot, steps_done, wait_until, write_config
from record_server import answering

from service import tracking
from tests.integration.processes import family, lives, workers

pytestmark = pytest.mark.integration

STEPS = 300


@pytest.fixture(params=["files", "sqlite", "postgresql"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of the record: a database that the job opens itself, or an `mlflow server` on either."""
    if request.param == "files":
        tracking.ensure_ready(f"sqlite:///{tmp_path}/mlflow.db")
        yield f"sqlite:///{tmp_path}/mlflow.db"
    else:
        (tmp_path / "server").mkdir()
        with answering(tmp_path / "server", request.param) as server:
            yield server.uri


def test_a_killed_job_is_shown_as_failed_or_resumed_and_in_the_end_as_finished(uri: str, tmp_path: Path) -> None:
    run = write_config(tmp_path, uri, STEPS)
    api = tracking.client(uri)

    def info() -> tuple[str, str | None]:
        found = api.get_run(run.read("run.json")["run_id"])
        return found.info.status, found.data.tags.get("lorot.resumed")

    # The worker dies: the launcher, which is still there, says so.
    job = lorot(tmp_path, "train", str(tmp_path / "job.yaml"))
    wait_until(lambda: steps_done(run) >= 25, tmp_path)
    # Else the launcher, which takes seconds for it, has many records to send before the end.
    wait_until(lambda: "train/loss" in api.get_run(run.read("run.json")["run_id"]).data.metrics, tmp_path)
    workers(job.pid)[0].kill()
    assert job.wait(120) != 0
    assert info() == ("FAILED", None)
    run_id = run.read("run.json")["run_id"]
    assert "SIGKILL" in api.get_run(run_id).data.tags["lorot.failure"]

    # All of it dies: nobody is there to say it.
    first = steps_done(run)
    job = lorot(tmp_path, "train", str(tmp_path / "job.yaml"), "--resume")
    wait_until(lambda: steps_done(run) >= first + 25, tmp_path)
    # Else the record may be a moment behind.
    wait_until(lambda: info() == ("RUNNING", "1"), tmp_path)
    killed = family(job.pid)
    for process in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait(120)
    wait_until(lambda: not any(map(lives, killed)), tmp_path)
    assert info() == ("RUNNING", "1")
    assert lorot(tmp_path, "sync", str(tmp_path / "runs")).wait(120) == 0
    assert info() == ("FAILED", "1")

    assert lorot(tmp_path, "train", str(tmp_path / "job.yaml"), "--resume").wait(300) == 0
    assert info() == ("FINISHED", "2")
    found = api.get_run(run_id)
    assert "lorot.failure" not in found.data.tags
    (recorded,) = api.search_runs([found.info.experiment_id])
    assert recorded.info.run_id == run_id
    history = api.get_metric_history(run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, STEPS + 1))
    assert {line["step"]: line["train/loss"] for line in lines_of(run) if "train/loss" in line} == {
        point.step: point.value for point in history
    }
