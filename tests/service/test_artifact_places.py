"""Where artifacts may lie: whoever reaches MLflow can name any place, and nothing of ours goes there for them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.utils.file_utils import local_file_uri_to_path

from service import artifact_places, bundle, registry, resolution, run_creation, store
from service.artifact_places import PlaceError, refuse_foreign
from service.delivery import Delivery
from service.errors import CheckpointError, ConfigError
from service.jobs.record import Record
from service.operations import backup
from service.spool import RefusedError
from tests.service.job_specs import settings, spec
from tests.service.small_model import CARD, written
from tests.service.stepped_service import Service

SERVER = "http://mlflow.lan:5000"
LOCAL = "sqlite:////srv/lorot/mlflow.db"


@pytest.mark.parametrize(
    ("location", "uri", "roots"),
    [
        ("mlflow-artifacts:/1/run/artifacts", SERVER, ()),
        ("mlflow-artifacts://mlflow.lan:5000/1", SERVER, ()),
        ("mlflow-artifacts://mlflow.lan:5000/1", "http://me:secret@mlflow.lan:5000", ()),
        ("http://mlflow.lan:5000/api/2.0/mlflow-artifacts/artifacts/1", SERVER, ()),
        *((f"{scheme}://bucket/1", SERVER, ()) for scheme in ("s3", "gs", "wasbs", "abfss")),
        ("/srv/lorot/artifacts/run/artifacts", LOCAL, ()),
        ("file:///srv/lorot/artifacts/run", LOCAL, ()),
        ("file:///srv/lorot/mlruns/0/run", LOCAL, ()),
        ("file:///srv/lorot/mlruns/0/run", "sqlite:////srv/lorot/mlruns/mlflow.db", ()),
        ("file:///mnt/shared/1/run", SERVER, ("/mnt/shared",)),
        ("/mnt/shared/1/run", SERVER, ("/elsewhere", "/mnt/shared")),
        ("sftp://store.lan/lorot/1", SERVER, ("sftp://store.lan/lorot",)),
        ("file:///mnt/shared/1/run", SERVER, artifact_places.absolute(["file:///mnt/shared"])),
        ("/mnt/shared/1/run", SERVER, artifact_places.absolute(["file:///mnt/shared"])),
        ("dbfs:/databricks/tracking/1", "databricks", artifact_places.absolute(["dbfs:/databricks/tracking"])),
        ("file:///anywhere", SERVER, None),
    ],
)
def test_stores_the_server_and_what_the_operator_names_are_taken(
    location: str, uri: str, roots: artifact_places.Roots | None
) -> None:
    refuse_foreign(location, uri, roots)


@pytest.mark.parametrize(
    ("location", "uri", "roots"),
    [
        ("file:///etc", SERVER, ()),
        ("FILE:///etc", SERVER, ()),
        ("file://localhost/etc", SERVER, ()),
        ("/etc", SERVER, ()),
        ("relative", SERVER, ()),
        ("", SERVER, ()),
        ("c:/etc", SERVER, ()),
        ("file:///srv/lorot/artifacts/run", SERVER, ()),
        ("file:///srv/lorot/results", LOCAL, ()),
        ("file:///srv/lorot/artifacts/../state", LOCAL, ()),
        ("file:///srv/lorot/artifacts/%2e%2e/state", LOCAL, ()),
        ("file:///srv/lorot/artifacts-of-others", LOCAL, ()),
        ("file:///mnt/shared/../../etc", SERVER, ("/mnt/shared",)),
        ("/mnt/shared-too/1", SERVER, ("/mnt/shared",)),
        ("sftp://store.lan/lorot/../1", SERVER, ("sftp://store.lan/lorot",)),
        ("sftp://store.lan/lorot/%2E%2E/1", SERVER, ("sftp://store.lan/lorot",)),
        ("sftp://store.lan/lorot2", SERVER, ("sftp://store.lan/lorot",)),
        *((f"{scheme}:/a", SERVER, ()) for scheme in ("runs", "models", "dbfs", "hdfs", "viewfs", "ftp", "sftp")),
        # They would be told the password of the server, and may be this machine's own.
        ("http://127.0.0.1:9200/1", SERVER, ()),
        ("mlflow-artifacts://127.0.0.1:9200/1", SERVER, ()),
        ("http://mlflow.lan:5000@evil.lan/1", SERVER, ()),
        (r"http://mlflow.lan:5000\@evil.lan/1", SERVER, ()),
        ("http://mlflow.lan:5000/1", LOCAL, ()),
    ],
)
def test_whatever_else_this_machine_would_open_is_refused(
    location: str, uri: str, roots: artifact_places.Roots
) -> None:
    with pytest.raises(PlaceError, match="artifact_roots"):
        refuse_foreign(location, uri, roots)


def test_links_are_followed_before_it_is_decided(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "link").symlink_to("/etc")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    refuse_foreign(f"{tmp_path}/artifacts/1", uri, ())
    with pytest.raises(PlaceError):
        refuse_foreign(f"{tmp_path}/artifacts/link/1", uri, ())


@pytest.mark.parametrize(
    "location", ["/a b/c", "file:///a%20b/c", "file:/a;b/c;d?e#f", "/a%20b;c?d", "file://host/a", "a/b", "FILE:///a"]
)
def test_a_path_is_read_as_mlflow_reads_it(location: str) -> None:
    assert artifact_places.local_path(location) == Path(local_file_uri_to_path(location))


def test_a_process_that_a_person_starts_trusts_their_server_and_a_jobs_trusts_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(artifact_places.VARIABLE, raising=False)
    assert artifact_places.given() is None
    monkeypatch.setenv(artifact_places.VARIABLE, '["/mnt/a"]')
    assert artifact_places.given() == ("/mnt/a",)
    for wrong in ("/mnt/a", "[1]", "{}"):
        monkeypatch.setenv(artifact_places.VARIABLE, wrong)
        with pytest.raises(ConfigError, match="JSON list"):
            artifact_places.given()


@pytest.fixture
def outside(place: str, tmp_path: Path) -> Callable[[], list[Path]]:
    """An experiment "trap" whose artifacts are to go to a folder outside; asks what lies there."""
    (tmp_path / "outside").mkdir()
    store.client().create_experiment("trap", artifact_location=(tmp_path / "outside").as_uri())
    return lambda: list((tmp_path / "outside").rglob("*"))


def test_a_job_in_an_experiment_that_keeps_artifacts_elsewhere_is_refused(
    outside: Callable[[], list[Path]], tmp_path: Path
) -> None:
    service = Service(settings(tmp_path))
    with pytest.raises(ConfigError, match=r"experiment: 'trap' keeps artifacts at file://.*outside"):
        service.submit(experiment="trap")
    assert service.desk.record.jobs() == []
    named = Service(settings(tmp_path, artifact_roots=("outside",), state=tmp_path / "other"))
    assert named.submit(experiment="trap").state == "queued"


def test_a_run_that_somebody_has_put_there_ends_and_nothing_of_it_is_written(
    outside: Callable[[], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(settings(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(artifact_places, "refuse_foreign", lambda *_: None)
        job = service.submit(experiment="trap")
    service.step()
    (tmp_path / "jobs" / job.id / "attempts" / "1" / "log-node0.txt").write_text("a line\n")
    service.backend.end(service.name(job))
    service.step()
    found = service.desk.get(job.id)
    assert found.state == "finished"
    assert "what it left is not kept: artifacts at file://" in found.reason
    assert outside() == []


def test_records_of_such_a_run_are_delivered_without_its_files(
    outside: Callable[[], list[Path]], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = run_creation.create_run(place, "trap", "run")
    (tmp_path / "file.txt").write_text("content")
    record = {"op": "artifact", "path": "file.txt", "subfolder": None}
    for refused in (
        record,
        {"op": "text", "text": "x", "name": "x.txt"},
        {"op": "register", "folder": "model", "name": "m", "metric": "val/top1", "mode": "max"},
    ):
        with pytest.raises(RefusedError, match="artifact_roots"):
            Delivery(place, run_id, tmp_path, ())([refused])
    assert outside() == []
    assert store.client().search_registered_models() == []
    # As a job's own process is told, and as a person's is not.
    monkeypatch.setenv(artifact_places.VARIABLE, "[]")
    with pytest.raises(RefusedError):
        Delivery(place, run_id, tmp_path)([record])
    monkeypatch.delenv(artifact_places.VARIABLE)
    Delivery(place, run_id, tmp_path)([record])
    assert [path.name for path in outside() if path.is_file()] == ["file.txt"]


def test_a_model_is_not_read_from_there_nor_from_beside_its_run(
    outside: Callable[[], list[Path]], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = run_creation.create_run(place, "trap", "run")
    folder = written(tmp_path / "model", dataclasses.replace(CARD, run_id=run_id))
    registry.register(folder, name="m", run_id=run_id, metric="val/top1")
    monkeypatch.setenv(artifact_places.VARIABLE, "[]")
    for address in ("models:/m/1", f"runs:/{run_id}"):
        with pytest.raises(CheckpointError, match=r"outside.*artifact_roots"):
            resolution.resolve(address)
    monkeypatch.setenv(artifact_places.VARIABLE, f'["{tmp_path}/outside"]')
    assert (resolution.resolve("models:/m/1").folder / bundle.CARD).is_file()
    store.client().create_model_version("m", f"runs:/{run_id}/model/../../../../model", run_id)
    with pytest.raises(CheckpointError, match="no run's artifact"):
        resolution.resolve("models:/m/2")


def test_a_backup_does_not_take_what_lies_there(outside: Callable[[], list[Path]], place: str, tmp_path: Path) -> None:
    Record(settings(tmp_path)).create(spec())
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    said: list[str] = []
    target = backup.back_up(settings(tmp_path), tmp_path / "backup.tar", say=said.append)
    assert b"secret.txt" not in target.read_bytes()
    assert any(line.startswith("left out: artifacts at file://") for line in said)
    named = settings(tmp_path, artifact_roots=(str(tmp_path / "outside"),))
    assert b"secret.txt" in backup.back_up(named, tmp_path / "named.tar").read_bytes()
