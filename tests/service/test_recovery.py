"""Runs whose processes were killed: shown as failed or resumed, and never as running for ever."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from small_model import CARD, written

from service import holder, ownership, recovery, registry, store, tracking
from service.cli import main
from service.config import TrackingConfig
from service.errors import ConfigError, JobError, TakenError, TrackingError
from service.holder import Holder
from service.jobs import outcome
from service.run_folder import RunFolder
from service.spool import Spool

ROOT = Path(__file__).resolve().parents[2]
QUIET = TrackingConfig(system_metrics=False)
JOB = """
import json, os, signal, sys
from pathlib import Path
from service import tracking
from service.config import TrackingConfig
folder = Path(sys.argv[1])
earlier = json.loads((folder / "run.json").read_text())["run_id"] if len(sys.argv) > 2 else None
run = tracking.open_run(TrackingConfig(system_metrics=False), name="job", folder=folder, run_id=earlier)
(folder / "run.json").write_text(json.dumps(run.about()))
for step in range(1, 6):
    run.log_metrics({"loss": float(step)}, step)
assert run.settle(60)
run.log_metrics({"loss": 6.0}, 6)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_job(folder: Path, *arguments: str) -> str:
    """Run a job in a process of its own that is killed in the middle; returns the run's id."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_RUN_ID"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", JOB, str(folder), *arguments], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    return str(RunFolder(folder).read("run.json")["run_id"])


def status(run_id: str) -> str:
    return str(tracking.client().get_run(run_id).info.status)


def tags(run_id: str) -> dict[str, str]:
    return dict(tracking.client().get_run(run_id).data.tags)


def losses(run_id: str) -> list[float]:
    return [point.value for point in tracking.client().get_metric_history(run_id, "loss")]


def last_time_ms(folder: Path) -> int:
    lines = (folder / "spool.jsonl").read_text().splitlines()
    return int(next(json.loads(line)["time_ms"] for line in reversed(lines) if '"metrics"' in line))


def test_a_killed_run_is_marked_by_its_launcher_at_the_time_of_its_last_record(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "job"
    run_id = killed_job(folder)
    assert status(run_id) == "RUNNING"
    died_ms = last_time_ms(folder)
    outcome.settle(RunFolder(folder), JobError("worker 0 was ended by SIGKILL\n  | its last lines"))
    found = tracking.client().get_run(run_id)
    assert (found.info.status, found.info.end_time) == ("FAILED", died_ms)
    assert found.data.tags["lorot.failure"] == "worker 0 was ended by SIGKILL"
    assert losses(run_id) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("code", "expected"), [(130, "KILLED"), (75, "KILLED"), (1, "FAILED"), (8, "FAILED")])
def test_a_job_that_was_stopped_is_killed_and_any_other_failed(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: str
) -> None:
    run = tracking.open_run(QUIET, name="job", folder=tmp_path / "run")
    assert run.settle(60)
    # As if the process had gone, which is this one.
    run._sender.stop()
    run._spool.close()
    monkeypatch.setattr(Holder, "is_alive", lambda self: False)
    outcome.settle(RunFolder(tmp_path / "run"), JobError("it ended", code))
    assert status(run.run_id) == expected


def test_a_launcher_that_has_no_time_left_leaves_the_end_in_the_spool_for_later(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "job"
    run_id = killed_job(folder)
    answers = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "_delivery", lambda *_: lambda records: answers.wait(120) and 1 / 0)
        outcome.settle(RunFolder(folder), JobError("stopped by SIGTERM", 75), within_s=1.0)
        # It has not waited for the server.
        (sending,) = [thread for thread in threading.enumerate() if thread.name == "outcome"]
        answers.set()
        sending.join()
    assert status(run_id) == "RUNNING"
    recovery.sync(folder)
    assert (status(run_id), losses(run_id)) == ("KILLED", [1, 2, 3, 4, 5, 6])


def test_what_the_workers_said_themselves_stands(place: str, tmp_path: Path) -> None:
    run = tracking.open_run(QUIET, name="job", folder=tmp_path / "run")
    run.finish("KILLED")
    outcome.settle(RunFolder(tmp_path / "run"), JobError("torchrun ended with exit code 1"))
    assert recovery.sync(tmp_path / "run") == recovery.Synced(tmp_path / "run")
    assert status(run.run_id) == "KILLED"
    assert "lorot.failure" not in tags(run.run_id)


def test_a_folder_without_a_run_needs_no_end(tmp_path: Path) -> None:
    outcome.settle(RunFolder(tmp_path), JobError("nothing was begun"))
    assert list(tmp_path.iterdir()) == []


def test_runs_whose_launcher_was_killed_too_are_found_by_sync_and_living_ones_are_left_alone(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = killed_job(tmp_path / "runs" / "dead")
    alive = tracking.open_run(QUIET, name="job", folder=tmp_path / "runs" / "alive")
    done = tracking.open_run(QUIET, name="job", folder=tmp_path / "runs" / "done")
    done.finish()
    (tmp_path / "runs" / "no-run").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["sync", str(tmp_path / "runs")])
    told = capsys.readouterr().out
    assert [status(run) for run in (dead, alive.run_id, done.run_id)] == ["FAILED", "RUNNING", "FINISHED"]
    assert f"run {dead} is marked FAILED" in told
    assert f"{tmp_path}/runs/done: 0 records sent" in told
    # Not all could be seen to: the exit code says so.
    assert "still running" in told
    assert ended.value.code == 6
    alive.finish()
    assert status(alive.run_id) == "FINISHED"


def test_a_run_whose_torchrun_still_lives_is_not_marked_though_its_worker_was_killed(
    place: str, tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    run_id = killed_job(folder)
    agent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); "
            "fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(600)",
            str(folder / "launcher.lock"),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert agent.stdout is not None
        agent.stdout.readline()
        with pytest.raises(TrackingError, match="still running"):
            recovery.sync(folder)
        assert status(run_id) == "RUNNING"
    finally:
        agent.kill()
        agent.wait()
    assert recovery.sync(folder).ended == run_id
    assert status(run_id) == "FAILED"


def test_a_resumed_run_is_running_again_with_its_count_and_ends_finished(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    run_id = killed_job(folder)
    recovery.sync(folder)
    assert killed_job(folder, "--resume") == run_id
    assert status(run_id) == "RUNNING"
    assert tags(run_id)["lorot.resumed"] == "1"
    assert "lorot.failure" not in tags(run_id)
    again = tracking.open_run(QUIET, name="job", folder=folder, run_id=run_id)
    again.log_metrics({"loss": 7.0}, 7)
    assert again.settle(60)
    assert (status(run_id), again.resumed, tags(run_id)["lorot.resumed"]) == ("RUNNING", 2, "2")
    again.finish()
    assert status(run_id) == "FINISHED"
    assert losses(run_id) == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_that_was_resumed_elsewhere_is_not_marked_by_the_machine_it_left(place: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here" / "job", tmp_path / "there" / "job"
    run_id = killed_job(here)
    shutil.copytree(here, there)
    moved = tracking.open_run(QUIET, name="job", folder=there, run_id=run_id)
    assert moved.settle(60)
    assert recovery.sync(here).ended == run_id
    assert status(run_id) == "RUNNING"
    assert "lorot.failure" not in tags(run_id)
    moved.finish()
    recovery.sync(here)
    assert status(run_id) == "FINISHED"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is another machine than the one that runs were killed on."""
    monkeypatch.setattr(holder, "_boot", lambda: "of another machine")
    monkeypatch.setattr(Holder, "is_local", lambda self: False)


@pytest.mark.usefixtures("elsewhere")
def test_another_machines_run_in_a_folder_that_nobody_takes_is_not_this_ones_to_end(place: str, tmp_path: Path) -> None:
    run_id = killed_job(tmp_path / "job")
    assert recovery.sync(tmp_path / "job").ended == ""
    assert status(run_id) == "RUNNING"


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("foreign", [False, True])
def test_another_machines_run_is_ended_once_its_sign_of_life_was_seen_to_stand_still(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: bool
) -> None:
    folder = tmp_path / "job"
    run_id = killed_job(folder)
    owner = ownership.Ownership(folder, "another machine")
    owner.take()

    def sync() -> recovery.Synced:
        return recovery.sync_foreign(folder, place, run_id, ()) if foreign else recovery.sync(folder)

    with monkeypatch.context() as patch:
        # It beats once a second; for a lock that is held one waits no longer than that.
        patch.setattr(ownership, "WATCH_S", 60.0)
        patch.setattr(ownership.Ownership, "_wait_for_lock", lambda self: False)
        with pytest.raises(TakenError, match="another job runs there"):
            sync()
        assert status(run_id) == "RUNNING"
    # Its machine loses its power: the lock is gone, and nobody has taken the sign away.
    sign = (folder / ownership.OWNER).read_text()
    owner.release()
    (folder / ownership.OWNER).write_text(sign)
    monkeypatch.setattr(ownership, "WATCH_S", 1.0)
    assert sync().ended == run_id
    assert status(run_id) == "FAILED"


def test_a_run_whose_holder_can_be_seen_to_live_is_not_ended_though_nobody_has_its_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between a worker's end and its next start by torchrun."""
    folder = tmp_path / "job"
    run_id = killed_job(folder)
    owner = ownership.Ownership(folder)
    owner.take()
    owner.release()
    monkeypatch.setattr(Holder, "is_alive", lambda self: True)
    assert recovery.sync(folder).ended == ""
    assert status(run_id) == "RUNNING"


def test_the_folder_of_a_killed_run_taken_by_another_ends_the_first(place: str, tmp_path: Path) -> None:
    first = killed_job(tmp_path / "job")
    second = tracking.open_run(QUIET, name="job", folder=tmp_path / "job")
    second.finish()
    for path in (tmp_path / "job").glob("spool-*.jsonl"):
        Spool(path, patience_s=30).close()
    assert status(first) == "FAILED"
    assert losses(first) == [1, 2, 3, 4, 5, 6]
    assert status(second.run_id) == "FINISHED"


def test_a_folder_in_which_another_job_records_costs_no_run_that_is_running_for_ever(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_PATIENCE_S", 0.2)
    first = tracking.open_run(QUIET, name="job", folder=tmp_path / "job")
    with pytest.raises(TakenError, match="held by another job"):
        tracking.open_run(QUIET, name="job", folder=tmp_path / "job")
    first.finish()
    api = tracking.client()
    runs = api.search_runs([api.get_experiment_by_name("lorot").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]


def test_a_folder_in_which_workers_without_a_launcher_write_is_synced_after_them(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "WATCH_S", 0.5)
    run_id = tracking.client().create_run("0").info.run_id
    foreign_spool(tmp_path, run_id, {"op": "tags", "values": {"b": "1"}})
    owner = ownership.Ownership(tmp_path)
    owner.take()
    with pytest.raises(TakenError):
        recovery.sync(tmp_path, place)
    with pytest.raises(TakenError):
        recovery.sync_foreign(tmp_path, place, run_id, ())
    assert "b" not in tags(run_id)
    owner.release()
    assert recovery.sync(tmp_path, place).sent == 1
    assert tags(run_id)["b"] == "1"


def test_sync_of_a_folder_without_runs_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="folder of them"):
        recovery.sync_all(tmp_path)


# --- registration


def test_a_model_registered_through_the_spool_gets_its_version_into_the_summary(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    run = tracking.open_run(QUIET, name="job", folder=folder)
    written(folder / "model", CARD)
    (folder / "summary.json").write_text('{"name": "job", "model_version": null, "images": 3}')
    run.register_model(folder / "model", "lorot-demo", "val/top1", "max")
    run.log_artifact(folder / "summary.json")
    assert run.finish() == ""
    summary = RunFolder(folder).read("summary.json")
    assert (summary["model_name"], summary["model_version"], summary["images"]) == ("lorot-demo", 1, 3)
    kept = tmp_path / "mlruns" / "artifacts" / run.run_id / "artifacts" / "summary.json"
    assert json.loads(kept.read_text())["model_version"] == 1
    assert [(row.version, row.run_id) for row in registry.list_models()] == [(1, run.run_id)]


def test_a_bundle_that_is_damaged_is_left_out_and_the_records_behind_it_arrive(place: str, tmp_path: Path) -> None:
    run = tracking.open_run(QUIET, name="job", folder=tmp_path / "job")
    run.register_model(tmp_path / "job" / "model", "lorot-demo", "val/top1", "max")
    run.log_metrics({"loss": 1.0}, 1)
    assert run.finish() == ""
    assert losses(run.run_id) == [1.0]


def test_a_name_that_mlflow_refuses_is_refused_before_the_training(tmp_path: Path) -> None:
    from service import config

    (tmp_path / "job.yaml").write_text("data: {name: demo, root: drawn}\n")
    with pytest.raises(ConfigError, match=r"registry\.name"):
        config.load(tmp_path / "job.yaml", ["registry.name=a/b"])
    assert config.load(tmp_path / "job.yaml", ["registry.name=''"]).model_name == ""


def test_a_version_whose_twin_was_served_late_is_there_once(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    run = tracking.open_run(QUIET, name="job", folder=folder)
    run.finish()
    card = written(folder / "model", CARD)
    first = registry.register(card, name="lorot-demo", run_id=run.run_id, metric="val/top1")
    api = store.client()
    known = api.get_model_version("lorot-demo", str(first))
    twin = api.create_model_version("lorot-demo", known.source, run.run_id, tags=known.tags)
    assert int(twin.version) != first
    assert registry.register(card, name="lorot-demo", run_id=run.run_id, metric="val/top1") == first
    assert [row.version for row in registry.list_models()] == [first]


def test_a_version_again_that_somebody_has_given_an_alias_stays(place: str, tmp_path: Path) -> None:
    run = tracking.open_run(QUIET, name="job", folder=tmp_path / "job")
    run.finish()
    card = written(tmp_path / "job" / "model", CARD)
    first = registry.register(card, name="lorot-demo", run_id=run.run_id, metric="val/top1")
    api = store.client()
    known = api.get_model_version("lorot-demo", str(first))
    named, spare = (
        int(api.create_model_version("lorot-demo", known.source, run.run_id, tags=known.tags).version) for _ in range(2)
    )
    api.set_registered_model_alias("lorot-demo", "production", str(named))
    assert registry.register(card, name="lorot-demo", run_id=run.run_id, metric="val/top1") == first
    assert {row.version for row in registry.list_models()} == {first, named}
    assert spare not in {first, named}
    assert int(api.get_model_version_by_alias("lorot-demo", "production").version) == named


# --- folders that foreign code has written


def foreign_spool(run: Path, run_id: str, *records: dict[str, object], name: str = "spool.jsonl") -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines = [{"run_id": run_id}, *({"time_ms": 1, **record} for record in records)]
    (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def kept_files(run_id: str) -> set[str]:
    return {file.path for file in tracking.client().list_artifacts(run_id)}


def test_of_a_foreign_folder_only_what_lies_in_it_goes_into_the_record(place: str, tmp_path: Path) -> None:
    api = tracking.client()
    info = api.create_run("0").info
    run_id = info.run_id
    run, secret = tmp_path / "job" / "run", tmp_path / "state" / "tokens.json"
    foreign_spool(
        run,
        run_id,
        {"op": "artifact", "path": "../../state/tokens.json", "subfolder": None},
        {"op": "artifact", "path": str(secret), "subfolder": None},
        {"op": "artifact", "path": "link", "subfolder": None},
        {"op": "artifact", "path": "linked", "subfolder": None},
        {"op": "artifact", "path": "linked/tokens.json", "subfolder": None},
        {"op": "artifact", "path": "folder", "subfolder": None},
        {"op": "artifact", "path": "own.txt", "subfolder": "../elsewhere"},
        {"op": "register", "folder": "../../state", "name": "stolen", "metric": "m", "mode": "max"},
        {"op": "tags", "values": {"lorot.job.state": "succeeded", "lorot.key": "k", "mine": "1"}},
        {"op": "metrics", "values": ["no", "mapping"], "step": 1},
        {"op": ["no", "word"]},
        {"op": "artifact", "path": "own.txt", "subfolder": None},
    )
    secret.parent.mkdir()
    secret.write_text("hush")
    (run / "own.txt").write_text("own")
    (run / "link").symlink_to(secret)
    (run / "linked").symlink_to(secret.parent)
    (run / "folder").mkdir()
    (run / "folder" / "deep").symlink_to(secret)
    assert recovery.sync_foreign(run, place, run_id, (info.artifact_uri,)).sent == 12
    assert kept_files(run_id) == {"own.txt"}
    told = tags(run_id)
    assert told["mine"] == "1"
    assert not [key for key in told if key.startswith("lorot.")]
    assert not api.search_registered_models()


def test_a_foreign_folder_speaks_for_no_other_run(place: str, tmp_path: Path) -> None:
    api = tracking.client()
    own, other = (api.create_run("0").info.run_id for _ in range(2))
    foreign_spool(tmp_path, other, {"op": "tags", "values": {"a": "1"}}, name="spool-other.jsonl")
    foreign_spool(tmp_path, own, {"op": "tags", "values": {"b": "1"}})
    assert recovery.sync_foreign(tmp_path, place, own, ()).sent == 1
    assert ("a" in tags(other), "b" in tags(own)) == (False, True)


def test_links_in_a_foreign_folder_lead_no_writing_elsewhere(place: str, tmp_path: Path) -> None:
    run_id = tracking.client().create_run("0").info.run_id
    run, mine = tmp_path / "run", tmp_path / "mine"
    foreign_spool(run, run_id, {"op": "tags", "values": {"b": "1"}})
    names = ["spool.sent-new", "spool.sent", "worker.lock", "owner.json", "spool-more.jsonl", "launcher.lock"]
    mine.mkdir()
    for name in names:
        (mine / name).write_text('{"run_id": "x"}\nhalf a line')
        (run / name).symlink_to(mine / name)
    assert recovery.sync_foreign(run, place, run_id, ()).sent == 1
    assert tags(run_id)["b"] == "1"
    assert {path.name for path in mine.iterdir()} == set(names)
    assert {path.read_text() for path in mine.iterdir()} == {'{"run_id": "x"}\nhalf a line'}
