"""The record of a job: what arrives in MLflow, whatever happens on the way."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import provenance, recovery, store, tracking
from service.config import TrackingConfig
from service.delivery import METRICS_PER_REQUEST, take
from service.errors import TrackingError
from service.spool import Sender

ROOT = Path(__file__).resolve().parents[2]
QUIET = TrackingConfig(system_metrics=False)


def open_run(folder: Path, **arguments: object) -> tracking.Run:
    return tracking.open_run(QUIET, name="job", folder=folder, **arguments)


def points(run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in tracking.client().get_metric_history(run_id, key)]


@pytest.fixture
def dead_uri() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


# --- in MLflow


def test_a_job_leaves_one_run_with_settings_numbers_and_files(place: str, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", tags={"data.digest": "abc"})
    run.log_params({"optimizer": {"lr": 0.1, "name": "sgd"}, "data": {"options": {}, "scale": [0.5, 1.0]}, "ema": None})
    for step in range(1, 31):
        run.log_metrics({"train/loss": 1 / step, "val/top1": step / 100}, step)
    run.log_text("seed: 0\n", "config.yaml")
    (tmp_path / "run" / "samples.png").write_bytes(b"png")
    run.log_artifact(tmp_path / "run" / "samples.png")
    assert run.finish() == ""

    api = tracking.client()
    experiment = api.get_experiment_by_name("lorot")
    (found,) = api.search_runs([experiment.experiment_id])
    assert found.info.run_id == run.run_id
    assert found.info.status == "FINISHED"
    assert found.data.params == {
        "optimizer.lr": "0.1",
        "optimizer.name": "sgd",
        "data.options": "{}",
        "data.scale": "[0.5, 1.0]",
        "ema": "null",
    }
    assert found.data.tags["data.digest"] == "abc"
    assert found.data.tags["version.python"] == ".".join(map(str, sys.version_info[:3]))
    assert points(run.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 31)]
    kept = tmp_path / "mlruns" / "artifacts" / run.run_id / "artifacts"
    assert (kept / "config.yaml").read_text() == "seed: 0\n"
    assert (kept / "samples.png").read_bytes() == b"png"


def test_numbers_that_are_not_finite_are_recorded_too(place: str, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.log_metrics({"loss": float("nan"), "norm": float("inf")}, 1)
    run.log_metrics({"loss": 0.5}, 2)
    run.finish("FAILED")
    data = tracking.client().get_run(run.run_id)
    assert data.info.status == "FAILED"
    assert data.data.metrics["loss"] == 0.5
    assert len(points(run.run_id, "loss")) == 2
    assert "norm" in data.data.metrics


def test_a_resumed_run_goes_on_under_its_id_and_repeats_no_step(place: str, tmp_path: Path) -> None:
    first = open_run(tmp_path / "run")
    for step in range(1, 11):
        first.log_metrics({"loss": step}, step)
    first.finish("KILLED")
    second = open_run(tmp_path / "run", run_id=first.run_id)
    for step in range(6, 16):
        second.log_metrics({"loss": step}, step)
    second.finish()
    assert points(first.run_id, "loss") == [(step, step) for step in range(1, 16)]
    assert tracking.client().get_run(first.run_id).info.status == "FINISHED"


def test_a_setting_that_changes_on_a_resume_becomes_a_tag_and_costs_no_other_setting(
    place: str, tmp_path: Path
) -> None:
    first = open_run(tmp_path / "run")
    first.log_params({"workers": 2, "seed": 0})
    first.finish()
    second = open_run(tmp_path / "run", run_id=first.run_id)
    second.log_params({"workers": 4, "seed": 0, "lr": 0.1})
    assert second.finish() == ""
    data = tracking.client().get_run(first.run_id).data
    assert data.params == {"workers": "2", "seed": "0", "lr": "0.1"}
    assert data.tags["changed.workers"] == "4"
    assert "changed.seed" not in data.tags


def test_a_hundred_settings_and_more_and_very_long_ones_arrive(place: str, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.log_params({"long": "x" * 7000, **{f"k{i}": i for i in range(250)}})
    run.finish()
    params = tracking.client().get_run(run.run_id).data.params
    assert len(params) == 251
    assert params["long"] == "x" * 5999 + "…"


def test_system_load_is_recorded_with_units_in_the_names(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    run = tracking.open_run(TrackingConfig(), name="job", folder=tmp_path / "run")
    spool, deadline = tmp_path / "run" / "spool.jsonl", time.monotonic() + 60
    while spool.read_text().count("system/system_memory_usage_megabytes") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.finish()
    memory = points(run.run_id, "system/system_memory_usage_megabytes")
    assert len(memory) >= 2
    assert [step for step, _ in memory] == list(range(len(memory)))
    assert all(value > 1 for _, value in memory)


def test_what_mlflow_will_never_take_is_left_out_and_the_rest_arrives(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(tmp_path / "run")
    run.log_metrics({"loss": 1.0}, 1)
    run.log_artifact(tmp_path / "run" / "never-written.png")
    run._append("metrics", step=2, values={"not@legal": 1.0})
    run._append("metrics", step=2, values={"loss": 2.0})
    assert run.finish() == ""
    assert points(run.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert "never-written.png has gone" in caplog.text
    assert "not@legal" in caplog.text


def test_resuming_a_run_that_the_database_does_not_know_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="knows no run 0000"):
        open_run(tmp_path / "run", run_id="0" * 32)


def test_nothing_is_printed_and_mlflow_is_imported_only_when_a_run_is_opened(place: str, tmp_path: Path) -> None:
    program = """
import sys, logging
from pathlib import Path
from service import registry, tracking
from service.config import TrackingConfig
assert not {"mlflow", "torch"} & set(sys.modules), "slow imports"
run = tracking.open_run(TrackingConfig(), name="job", folder=Path("run"))
run.log_metrics({"loss": 1.0}, 1)
run.log_artifact("run")
logging.getLogger("mlflow.store").warning("not for the terminal")
assert run.finish() == ""
assert registry.list_models() == []
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- without a server


def test_a_server_that_is_away_stops_a_new_run_within_five_seconds(dead_uri: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        tracking.open_run(TrackingConfig(uri=dead_uri), name="job", folder=tmp_path)
    # MLflow by itself would try for minutes.
    assert time.monotonic() - began < 50
    assert caught.value.exit_code == 6
    assert dead_uri in str(caught.value)
    assert "unset" in str(caught.value)


def test_a_server_that_accepts_and_never_answers_is_given_up_within_five_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert store._PROBE_S < 5
    monkeypatch.setattr(store, "_PROBE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        with pytest.raises(TrackingError, match="timed out"):
            store.ensure_ready(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - began < 60


def test_the_user_and_password_of_an_address_are_not_shown() -> None:
    with pytest.raises(TrackingError) as caught:
        store.ensure_ready("http://me:secret@127.0.0.1:1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["ftp://somewhere", "mlruns", "sqlite://mlflow.db"])
def test_an_address_of_no_known_kind_is_refused_with_one_that_works(uri: str) -> None:
    with pytest.raises(TrackingError, match="sqlite:///"):
        store.ensure_ready(uri)


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("something else")
    with pytest.raises(TrackingError, match="no MLflow database"):
        store.ensure_ready(f"sqlite:///{path}")
    assert path.read_text() == "something else"


def test_a_database_that_many_ask_for_at_once_is_created_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created = []
    real = store._create_database
    monkeypatch.setattr(store, "_create_database", lambda path: (created.append(path), real(path)))
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    failures: list[Exception] = []

    def ask() -> None:
        try:
            store.ensure_ready(uri)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(created) == 1
    assert tracking.client(uri).search_experiments()


def test_a_resumed_run_needs_no_server_and_its_records_are_sent_later_with_their_own_time(
    place: str, dead_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(tmp_path / "run")
    run.log_metrics({"loss": 1.0}, 1)
    run.finish("KILLED")

    away = tracking.open_run(
        TrackingConfig(uri=dead_uri, system_metrics=False), name="job", folder=tmp_path / "run", run_id=run.run_id
    )
    began = time.monotonic()
    for step in range(2, 502):
        away.log_metrics({"loss": float(step)}, step)
    # Whoever waited for the sender would pay half a second a record, and more and more.
    assert time.monotonic() - began < 30
    written_by_ms = time.time() * 1000
    # Nothing but its own limit ends the wait before those 30 s that `finish` would take by itself.
    monkeypatch.setattr(Sender.drain, "__defaults__", (3600.0,))
    began = time.monotonic()
    notice = away.finish(timeout_s=0.5)
    assert time.monotonic() - began < 25
    assert "spool.jsonl" in notice
    assert dead_uri in notice
    assert points(run.run_id, "loss") == [(1, 1.0)]

    assert recovery.sync(tmp_path / "run", place).sent >= 500
    history = tracking.client().get_metric_history(run.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, step) for step in range(1, 502)]
    assert all(m.timestamp <= written_by_ms for m in history)
    assert tracking.client().get_run(run.run_id).info.status == "FINISHED"
    assert recovery.sync(tmp_path / "run", place).sent == 0


def test_a_new_run_in_the_same_folder_sets_the_unsent_records_of_the_old_one_aside_and_sends_them(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tracking.Delivery, "_metrics", lambda self, records: (_ for _ in ()).throw(OSError("away")))
        old = open_run(tmp_path / "run")
        old.log_metrics({"loss": 1.0}, 1)
        deadline = time.monotonic() + 30
        while not old._sender.last_error and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "away" in old.finish(timeout_s=0.2)
    new = open_run(tmp_path / "run")
    new.log_metrics({"loss": 7.0}, 1)
    assert new.finish() == ""
    # In the background of the new run.
    deadline = time.monotonic() + 30
    while not points(old.run_id, "loss") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert points(old.run_id, "loss") == [(1, 1.0)]
    assert points(new.run_id, "loss") == [(1, 7.0)]


# --- names and settings


@given(st.text(min_size=0, max_size=300))
@settings(max_examples=200, deadline=None)
def test_every_key_becomes_one_that_mlflow_accepts(key: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_tag_name

    legal = tracking.legal_key(key)
    _validate_metric_name(legal)
    _validate_tag_name(legal)
    assert 0 < len(legal) <= 250


def test_keys_that_are_legal_stay() -> None:
    for key in ("train/step_time_p50_s", "optimizer.lr", "val/top1", "wsol/gt_known:0.5"):
        assert tracking.legal_key(key) == key


def test_nested_settings_become_dotted_keys() -> None:
    values = {"a": {"b": {"c": 1.5}, "d": "text"}, "e": True, "f": [1, "x"], "g": {}}
    assert tracking.flatten(values) == {"a.b.c": "1.5", "a.d": "text", "e": "true", "f": '[1, "x"]', "g": "{}"}


def test_the_commit_and_whether_the_code_differs_from_it_are_known_only_inside_its_own_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "service").mkdir()
    (tmp_path / "service" / "config.py").write_text("a = 1\n")
    assert provenance.code_version.__wrapped__(tmp_path) == {}
    git("init", "-q")
    # Inside a checkout that does not track it, as an installed copy in somebody's repository.
    assert provenance.code_version.__wrapped__(tmp_path) == {}
    git("add", ".")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert provenance.code_version.__wrapped__(tmp_path) == {"git.commit": commit, "git.dirty": "false"}
    (tmp_path / "service" / "config.py").write_text("a = 2\n")
    assert provenance.code_version.__wrapped__(tmp_path) == {"git.commit": commit, "git.dirty": "true"}


def test_metrics_go_together_up_to_mlflows_limit_and_all_else_alone() -> None:
    few = {"op": "metrics", "values": {str(i): 0.0 for i in range(400)}}
    other = {"op": "params", "values": {"a": "b"}}
    assert METRICS_PER_REQUEST == 1000
    assert take([few, few, few, few]) == 2
    assert take([few, other, few]) == 1
    assert take([other, few]) == 1
    assert take([{"op": "metrics", "values": {}}] * 5) == 5
