"""Backups of the record: all of it comes back, damaged or hostile archives change nothing, nothing is written over."""

import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from service import store
from service.api.tokens import Tokens
from service.commands import operations
from service.errors import ConfigError, LorotError, StorageError, TrackingError
from service.jobs import settings_file
from service.jobs.settings import ServiceSettings
from service.operations import archive, database
from service.operations.backup import back_up
from service.operations.restore import restore


@pytest.fixture
def settings(place: str, tmp_path: Path) -> ServiceSettings:
    """A service with a token, a job folder, and a record of two experiments and a registered model."""
    made = ServiceSettings(results=tmp_path / "jobs", state=tmp_path / "state", data_roots=(tmp_path / "data",))
    api = store.client(place)
    # As runs are recorded here; MLflow's own default, experiment 0, lies elsewhere.
    experiment = api.create_experiment("lorot", artifact_location=(tmp_path / "mlruns" / "artifacts").as_uri())
    for number, own in enumerate((experiment, experiment, "0")):
        run = api.create_run(own, run_name=f"run-{number}", tags={"tag": "ä" * 100})
        api.log_param(run.info.run_id, "lr", number / 10)
        for step in range(5):
            api.log_metric(run.info.run_id, "loss", 1 / (step + 1), step=step)
        api.log_text(run.info.run_id, f"weights {number}", "model/weights.txt")
    api.create_registered_model("demo")
    api.create_model_version("demo", f"runs:/{run.info.run_id}/model", run.info.run_id)
    api.set_registered_model_alias("demo", "best", "1")
    Tokens(made.state / "tokens.json").create("ann", "submit")
    (made.state / "service.lock").touch()
    attempt = made.results / ("a" * 32) / "attempts" / "1"
    attempt.mkdir(parents=True)
    (attempt / "log-node0.txt").write_text("line\n")
    return made


def told(uri: str) -> list[Any]:
    """All that MLflow says of runs, models and the texts of artifacts, without where they lie."""
    api = store.client(uri)
    experiments = [one.experiment_id for one in api.search_experiments()]
    found: list[Any] = []
    for run in sorted(api.search_runs(experiments), key=lambda run: run.info.run_id):
        history = [(point.step, point.value) for point in api.get_metric_history(run.info.run_id, "loss")]
        text = Path(api.download_artifacts(run.info.run_id, "model/weights.txt")).read_text()
        found.append((run.info.run_id, run.info.run_name, run.data.params, dict(run.data.tags), history, text))
    for version in api.search_model_versions():
        found.append((version.name, version.version, version.run_id, version.source))
    return [*found, api.get_registered_model("demo").aliases]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_comes_back_is_what_was_there_and_needs_nothing_of_the_old_place(
    settings: ServiceSettings, place: str, tmp_path: Path
) -> None:
    before = told(place)
    made = back_up(settings, tmp_path / "b.tar", with_jobs=True)
    state = tree(settings.state)
    for folder in ("mlruns", "state", "jobs"):
        shutil.rmtree(tmp_path / folder)
    done = restore(made, tmp_path / "new" / "place")
    after = settings_file.load(done.settings)
    assert after.tracking_uri == f"sqlite:///{tmp_path}/new/place/mlflow.db"
    assert told(after.tracking_uri) == before
    assert tree(after.state) == {name: own for name, own in state.items() if not name.endswith(".lock")}
    assert [token.name for token in Tokens(after.state / "tokens.json").list()] == ["ann"]
    assert (after.results / ("a" * 32) / "attempts" / "1" / "log-node0.txt").read_text() == "line\n"
    assert after.data_roots == (tmp_path / "data",)
    assert not (tmp_path / "mlruns").exists()
    # And it can be gone on with there.
    api = store.client(after.tracking_uri)
    run = api.create_run(api.get_experiment_by_name("lorot").experiment_id)
    api.log_text(run.info.run_id, "new", "new.txt")
    assert [path.read_text() for path in (tmp_path / "new").rglob("new.txt")] == ["new"]


def test_without_job_folders_the_old_ones_are_named_and_without_artifacts_it_says_so(
    settings: ServiceSettings, tmp_path: Path
) -> None:
    said: list[str] = []
    back_up(settings, tmp_path / "b.tar", with_artifacts=False, say=said.append)
    assert any("no registered models" in text for text in said)
    done = restore(tmp_path / "b.tar", tmp_path / "new")
    after = settings_file.load(done.settings)
    assert after.results == settings.results
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["mlflow.db", "service.yaml", "state"]


def test_a_folder_as_target_gets_a_file_named_by_the_time_that_only_its_owner_reads(
    settings: ServiceSettings, tmp_path: Path
) -> None:
    (tmp_path / "backups").mkdir()
    made = back_up(settings, tmp_path / "backups")
    assert [path.name for path in (tmp_path / "backups").iterdir()] == [made.name]
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    restore(made, tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new" / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "new" / "state" / "tokens.json").stat().st_mode) == 0o600


def test_a_snapshot_taken_while_others_write_holds_whole_transactions_only(
    settings: ServiceSettings, place: str, tmp_path: Path
) -> None:
    from mlflow.entities import Metric

    run_id = store.client(place).create_run("0").info.run_id
    ended = threading.Event()
    written = [0]

    def write() -> None:
        api = store.client(place)
        while not ended.is_set():
            written[0] += 1
            pair = [Metric(name, written[0], 1, written[0]) for name in ("a", "b")]
            api.log_batch(run_id, metrics=pair)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = []
        for number in range(4):
            begun = written[0]
            database.dump(store.absolute(place), tmp_path / f"{number}.db")
            connection = sqlite3.connect(tmp_path / f"{number}.db")
            steps = {
                name: {step for (step,) in connection.execute("SELECT step FROM metrics WHERE key = ?", name)}
                for name in ("a", "b")
            }
            connection.close()
            assert steps["a"] == steps["b"] == set(range(1, len(steps["a"]) + 1))
            # All that was acknowledged before it began.
            assert len(steps["a"]) >= begun - 1
            seen.append(len(steps["a"]))
            while written[0] < begun + 5:
                assert writer.is_alive()
                ended.wait(0.01)
    finally:
        ended.set()
        writer.join()
    assert seen == sorted(set(seen))


def test_nothing_that_is_there_is_written_over(settings: ServiceSettings, tmp_path: Path) -> None:
    made = back_up(settings, tmp_path / "b.tar")
    content = made.read_bytes()
    with pytest.raises(ConfigError, match="not overwritten"):
        back_up(settings, made)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not overwritten"):
        restore(made, tmp_path / "new")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not overwritten"):
        restore(made, tmp_path / "link")
    with pytest.raises(ConfigError, match="not overwritten"):
        restore(made, made)
    assert made.read_bytes() == content
    assert tree(tmp_path / "new") == {"mine.txt": b"mine"}
    # An empty folder is as good as none.
    (tmp_path / "new" / "mine.txt").unlink()
    restore(made, tmp_path / "new")


def test_a_backup_that_fails_leaves_nothing(settings: ServiceSettings, tmp_path: Path) -> None:
    (tmp_path / "backups").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_bytes(b"no database at all, but a text of some length" * 100)
    with pytest.raises(TrackingError):
        back_up(settings, tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []
    with pytest.raises(StorageError):
        back_up(settings, tmp_path / "nowhere" / "b.tar")


def test_what_a_service_needs_only_while_it_runs_and_the_database_itself_are_not_among_the_files(
    settings: ServiceSettings, place: str, tmp_path: Path
) -> None:
    for name in ("service.json", "session.key", "session.closed", "submit.lock", ".tokens.json.writing"):
        (settings.state / name).write_text("of now")
    # As where MLflow was told to keep artifacts beside its database.
    store.client(place).create_experiment("beside", artifact_location=(tmp_path / "mlruns").as_uri())
    made = back_up(settings, tmp_path / "b.tar")
    with archive.reading(made) as reader:
        names = list(reader.manifest.files)
    assert sorted(name for name in names if name.startswith("state/")) == ["state/tokens.json"]
    assert [name for name in names if "mlflow.db" in name] == ["database/mlflow.db"]
    assert any(name.endswith("weights.txt") for name in names)


def test_what_comes_while_files_are_read_is_in_the_backup_whole_or_not_at_all(
    settings: ServiceSettings, place: str, tmp_path: Path
) -> None:
    """A run that comes when the artifacts have been read already: the database of before knows nothing of it."""
    before = told(place)

    def say(text: str) -> None:
        if text.startswith("job folders"):
            api = store.client(place)
            run_id = api.create_run(api.get_experiment_by_name("lorot").experiment_id).info.run_id
            api.log_text(run_id, "weights late", "model/weights.txt")

    made = back_up(settings, tmp_path / "b.tar", with_jobs=True, say=say)
    assert len(told(place)) == len(before) + 1
    done = restore(made, tmp_path / "new")
    after = told(str(settings_file.load(done.settings).tracking_uri))
    assert [entry[0] for entry in after[:-2]] == [entry[0] for entry in before[:-2]]


@pytest.mark.parametrize("trouble", ["database", "room"])
def test_a_restore_that_fails_leaves_nothing(
    trouble: str, settings: ServiceSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = back_up(settings, tmp_path / "b.tar")

    def fails(*_: object) -> None:
        raise TrackingError("the database refuses")

    if trouble == "database":
        monkeypatch.setattr(database, "relocate", fails)
    else:
        usage = type(shutil.disk_usage(tmp_path))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, made.stat().st_size))
    with pytest.raises((TrackingError, StorageError), match=r"the database refuses|too little room"):
        restore(made, tmp_path / "there" / "new")
    assert list((tmp_path / "there").iterdir()) == []


def test_no_password_and_no_secret_gets_into_an_archive(settings: ServiceSettings, place: str, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("s3cr3t-one")
    given = settings.model_copy(
        update={
            "secrets": tmp_path / "secrets",
            "tracking_uri": "postgresql://ann:s3cr3t-two@host/db",
            "worker_tracking_uri": "http://ann:s3cr3t-three@host:5000",
            "browser_tracking_uri": "http://ann:s3cr3t-four@host:5000",
        }
    )
    made = back_up(given, tmp_path / "b.tar", database_uri=store.absolute(place), with_jobs=True)
    assert b"s3cr3t" not in made.read_bytes()
    with archive.reading(made) as reader:
        kept = yaml.safe_load(reader.text("settings.yaml"))
    assert kept["secrets"] == str(tmp_path / "secrets")
    assert "tracking_uri" not in kept


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://127.0.0.1:1", "--database"),
        ("mysql://host/db", "sqlite:///FILE and postgresql"),
        ("sqlite:///nowhere.db", "no such database"),
    ],
)
def test_a_database_that_cannot_be_backed_up_is_refused_with_what_would_work(
    tmp_path: Path, uri: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        back_up(ServiceSettings(tracking_uri=uri), tmp_path / "b.tar")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoken", "places", "expected"),
    [
        (None, ["mlflow-artifacts:/0"], True),
        (None, ["file:///a"], False),
        ("postgresql://h/db", ["mlflow-artifacts:/0"], False),
        ("http://h:5000", ["s3://bucket/0"], True),
    ],
)
@pytest.mark.parametrize("is_set", [True, False])
def test_a_service_that_spoke_to_a_server_does_so_after_the_restore(
    settings: ServiceSettings,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoken: str | None,
    places: list[str],
    expected: bool,
    is_set: bool,
) -> None:
    """What named the server, MLFLOW_TRACKING_URI or the settings, does so again; else the database's new place is."""
    if spoken and is_set:
        settings = settings.model_copy(update={"tracking_uri": spoken})
    elif spoken:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", spoken)
    monkeypatch.setattr(database, "locations", lambda uri: places)
    made = back_up(settings, tmp_path / "b.tar", database_uri=store.absolute("sqlite:///mlruns/mlflow.db"))
    done = restore(made, tmp_path / "new")
    after = settings_file.load(done.settings).tracking_uri
    if expected:
        assert after == (spoken if is_set else None)
    else:
        assert after == f"sqlite:///{tmp_path}/new/mlflow.db"
    assert done.names_tracking == (after is not None)


def test_a_missing_command_of_postgresql_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"pg_dump is not installed.*postgresql-client"):
        database.dump("postgresql://ann@127.0.0.1/db", tmp_path / "dump")
    assert "pw" not in database.without_password("postgresql+psycopg2://ann:pw@h:5432/db?sslmode=require")
    assert database.without_password("postgresql+psycopg2://ann:pw@h:5432/db") == "postgresql://ann@h:5432/db"


def test_locations_move_as_a_whole_and_only_those_that_were_named(empty_database: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(empty_database, path)
    uri = f"sqlite:///{path}"
    places = ["file:///a/b", "file:///a/bc", "/plain", "s3://bucket/x", "file:///a/b/new"]
    connection = sqlite3.connect(path)
    connection.execute("DELETE FROM experiments")
    for number, place in enumerate(places):
        row = (number, str(number), place, "active")
        connection.execute(
            "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) VALUES (?, ?, ?, ?)", row
        )
    connection.commit()
    assert database.locations(uri) == sorted(["file:///a/b", "file:///a/bc", "/plain", "s3://bucket/x"])
    # One goes to where another was: each moves once.
    database.relocate(uri, {"file:///a/b": "file:///c", "/plain": "/a", "file:///a/bc": "file:///a/b"})
    found = [row[0] for row in connection.execute("SELECT artifact_location FROM experiments ORDER BY experiment_id")]
    connection.close()
    assert found == ["file:///c", "file:///a/b", "/a", "s3://bucket/x", "file:///c/new"]


@pytest.fixture
def operated(settings: ServiceSettings, tmp_path: Path) -> Callable[..., str]:
    (tmp_path / "service.yaml").write_text("results: jobs\nstate: state\ndata_roots: [data]\n")

    import typer

    app = typer.Typer()
    operations.add_to(app)

    def run(*line: str) -> str:
        done = CliRunner().invoke(app, line)
        if isinstance(done.exception, LorotError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    return run


def test_the_databases_address_need_not_stand_where_all_users_of_the_machine_see_it(
    operated: Callable[..., str], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOROT_DATABASE", place)
    operated("backup", "b.tar", "tracking_uri=http://127.0.0.1:9", "--settings", "service.yaml", "--without-artifacts")
    monkeypatch.setenv("LOROT_DATABASE", "postgresql://ann:word@h/db")
    with pytest.raises(ConfigError, match="--database"):
        operated("restore", "b.tar", "other")


def test_the_commands_make_a_backup_and_bring_it_back(operated: Callable[..., str], place: str, tmp_path: Path) -> None:
    before = told(place)
    operated("backup", "b.tar", "--settings", "service.yaml")
    said = operated("restore", "b.tar", "new")
    assert f"lorot serve --settings {tmp_path}/new/service.yaml" in said
    assert told(f"sqlite:///{tmp_path}/new/mlflow.db") == before
    with pytest.raises(ConfigError, match="--database"):
        operated("restore", "b.tar", "other", "--database", "postgresql://h/db")
