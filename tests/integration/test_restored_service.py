"""Backup and restore of what runs: PostgreSQL with a tracking server, and a service whose jobs are at work."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import await_
from record_server import PostgreSQL, Server, free_port

from service import artifact_places, store
from service.errors import ConfigError, TrackingError
from service.jobs import settings_file
from service.jobs.settings import ServiceSettings
from service.operations import database
from service.operations.backup import back_up
from service.operations.restore import restore
from tests.integration.tiny_service import TinyService, spec

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQL]:
    made = PostgreSQL()
    yield made
    made.stop()


def told(uri: str) -> list[Any]:
    """All that MLflow says of runs, models and one artifact of each."""
    api = store.client(uri)
    experiments = [one.experiment_id for one in api.search_experiments()]
    found: list[Any] = []
    for run in sorted(api.search_runs(experiments), key=lambda run: run.info.run_id):
        history = [(point.step, point.value) for point in api.get_metric_history(run.info.run_id, "loss")]
        text = Path(api.download_artifacts(run.info.run_id, "model/weights.txt")).read_text()
        found.append((run.info.run_id, run.info.artifact_uri, run.data.params, dict(run.data.tags), history, text))
    found += [(one.name, one.version, one.run_id) for one in api.search_model_versions()]
    return [*found, api.get_registered_model("demo").aliases]


def test_a_tracking_server_on_postgresql_comes_back_whole_while_others_write_to_it(
    postgresql: PostgreSQL, tmp_path: Path
) -> None:
    from mlflow.entities import Metric

    uri = postgresql.database("before")
    before = Server(tmp_path, uri)
    before.start()
    try:
        api = store.client(before.uri)
        experiment = api.create_experiment("lorot")
        for number in range(3):
            run_id = api.create_run(experiment, run_name=f"run-{number}").info.run_id
            api.log_param(run_id, "lr", number)
            api.log_text(run_id, f"weights {number} äöü", "model/weights.txt")
        api.create_registered_model("demo")
        api.create_model_version("demo", f"runs:/{run_id}/model", run_id)
        api.set_registered_model_alias("demo", "best", "1")
        settings = ServiceSettings(state=tmp_path / "state", results=tmp_path / "jobs", tracking_uri=before.uri)
        with pytest.raises(ConfigError, match="--database"):
            back_up(settings, tmp_path / "refused.tar")

        ended, written = threading.Event(), [0]

        def write() -> None:
            writer = store.client(before.uri)
            while not ended.is_set():
                step = written[0] + 1
                writer.log_batch(run_id, metrics=[Metric(name, step, 1, step) for name in ("loss", "twin")])
                written[0] = step

        writing = threading.Thread(target=write)
        writing.start()
        try:
            await_(lambda: written[0] >= 3, "the writer writes", 60)
            acknowledged = written[0]
            back_up(settings, tmp_path / "b.tar", database_uri=uri, artifacts=tmp_path / "server-artifacts", say=print)
            await_(lambda: written[0] > acknowledged + 2, "the writer goes on", 60)
        finally:
            ended.set()
            writing.join()
        expected = told(before.uri)
    finally:
        before.kill()

    empty = postgresql.database("after")
    with pytest.raises(ConfigError, match="not overwritten"):
        restore(tmp_path / "b.tar", tmp_path / "new", database_uri=uri)
    with pytest.raises(ConfigError, match="empty database"):
        restore(tmp_path / "b.tar", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    done = restore(tmp_path / "b.tar", tmp_path / "new", database_uri=empty)
    assert done.server_artifacts == tmp_path / "new" / "artifacts" / "server"
    assert settings_file.load(done.settings).tracking_uri == before.uri
    (tmp_path / "server-artifacts").rename(tmp_path / "gone")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "server-artifacts").symlink_to(done.server_artifacts)
    after = Server(tmp_path / "again", empty)
    after.start()
    try:
        found = told(after.uri)
        api = store.client(after.uri)
        twin = [(point.step, point.value) for point in api.get_metric_history(run_id, "twin")]
    finally:
        after.kill()
    steps = {entry[0]: entry[4] for entry in found if len(entry) == 6}[run_id]
    # A prefix of what was written in the end, with all that was acknowledged before, and no half of a pair.
    assert [step for step, _ in steps] == list(range(1, len(steps) + 1))
    assert acknowledged <= len(steps) <= written[0]
    assert twin == steps
    for entries in (found, expected):
        entries[:] = [entry[:4] + entry[5:] if len(entry) == 6 else entry for entry in entries]
    assert found == expected


def test_a_database_on_postgresql_with_local_artifacts_is_moved_with_them(
    postgresql: PostgreSQL, tmp_path: Path
) -> None:
    uri = postgresql.database("plain")
    api = store.client(uri)
    experiment = api.create_experiment("lorot", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = api.create_run(experiment).info.run_id
    api.log_text(run_id, "weights", "model/weights.txt")
    folders = {
        "state": tmp_path / "state",
        "results": tmp_path / "jobs",
        "artifact_roots": [str(tmp_path / "artifacts")],
    }
    back_up(ServiceSettings.model_validate({**folders, "tracking_uri": uri}), tmp_path / "b.tar")
    empty = postgresql.database("moved")
    done = restore(tmp_path / "b.tar", tmp_path / "new", database_uri=empty)
    found = settings_file.load(done.settings)
    assert found.tracking_uri == empty
    # A service over the restored record reads them where they lie now.
    location = store.client(empty).get_run(run_id).info.artifact_uri
    artifact_places.refuse_foreign(location, empty, found.artifact_roots)
    (tmp_path / "artifacts").rename(tmp_path / "gone")
    moved = store.client(empty)
    assert Path(moved.download_artifacts(run_id, "model/weights.txt")).read_text() == "weights"
    assert str(tmp_path / "new") in moved.get_run(run_id).info.artifact_uri


def test_what_postgresql_says_of_a_failure_is_told_without_the_password(postgresql: PostgreSQL, tmp_path: Path) -> None:
    uri = f"postgresql+psycopg2://lorot:s3cr3t@127.0.0.1:{postgresql.port}/nowhere"
    with pytest.raises(TrackingError, match="nowhere") as raised:
        database.dump(uri, tmp_path / "dump")
    assert "s3cr3t" not in str(raised.value)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[list[TinyService]]:
    made: list[TinyService] = []
    yield made
    for service in made:
        service.kill()
        for process in psutil.process_iter(["cmdline"]):
            if any(str(service.folder) in word for word in process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def begin(services: list[TinyService], folder: Path) -> TinyService:
    service = TinyService(folder, free_port())
    services.append(service)
    if not (folder / "service.yaml").exists():
        service.configure(cpus=2)
    service.start()
    await_(service.is_ready, "the service is ready", 120, service.told)
    return service


def state(service: TinyService, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = service.ask(f"/v1/jobs/{job_id}")
    return found


def test_jobs_that_ran_at_the_time_of_the_backup_are_found_lost_after_it_and_go_on_within_their_budget(
    services: list[TinyService], tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    old = begin(services, tmp_path / "old")
    ids = {}
    # Longer than this test takes, until they are killed.
    for name, fields in {
        "patient": {"retries": 2, "seconds": 1000},
        "fragile": {"retries": 0, "seconds": 1000},
        "waiting": {"lines": 3},
    }.items():
        ids[name] = old.ask("/v1/jobs", {"spec": spec(name, **fields), "key": name})["id"]
    await_(lambda: old.noted()[0].total() == 2, "two jobs run", 60, old.told)
    await_(lambda: state(old, ids["fragile"])["state"] == "running", "that is recorded", 60, old.told)
    assert state(old, ids["waiting"])["state"] == "queued"
    back_up(settings_file.load(old.folder / "service.yaml"), tmp_path / "b.tar", with_jobs=True)

    # The machine is lost, with its disk.
    old.kill()
    for process in psutil.process_iter(["cmdline"]):
        if any(str(old.folder) in word for word in process.info["cmdline"] or ()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
    old.folder.rename(tmp_path / "lost")
    restore(tmp_path / "b.tar", tmp_path / "new")
    settings = settings_file.load(tmp_path / "new" / "service.yaml")
    assert settings.results == tmp_path / "new" / "jobs"

    new = begin(services, tmp_path / "new")
    await_(lambda: state(new, ids["waiting"])["state"] == "finished", "what waited has run", 60, new.told)
    await_(lambda: state(new, ids["fragile"])["state"] == "failed", "what may not be retried has failed", 60, new.told)
    await_(lambda: new.noted()[0][ids["patient"], "2"] == 1, "what was lost runs again", 60, new.told)
    await_(lambda: state(new, ids["patient"])["state"] == "running", "that is recorded", 60, new.told)
    patient = state(new, ids["patient"])
    assert [attempt["number"] for attempt in patient["attempts"]] == [1, 2]
    assert (patient["failures"], "gone" in patient["attempts"][0]["reason"]) == (1, True)
    assert "gone" in state(new, ids["fragile"])["reason"]
    # Of the first attempts nothing was started again, and the log of the first is still there.
    assert {attempt for _, attempt in new.noted()[0].keys() - {(ids["waiting"], "1")}} == {"2"}
    log = settings.results / ids["patient"] / "attempts" / "1" / "log-node0.txt"
    assert log.read_text().startswith("line 0")
    # Keys are still known.
    again = new.ask("/v1/jobs", {"spec": spec("waiting", lines=3), "key": "waiting"})
    assert again["id"] == ids["waiting"]
    assert new.ask("/v1/jobs")["total"] == 3
