"""Trainings as jobs of this machine, by the desk and the controller with the real `lorot train`, to their models."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from service import store
from service.errors import StateError
from service.jobs import orders, runner, settings_file
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.job import Job
from service.jobs.record import Record
from service.jobs.spec import JobSpec
from tests.integration.processes import await_, family
from tests.integration.small_job import CONFIG, LOG_EVERY

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
# So many that a busy machine can still stop it before its end.
STEPS = 160
# After which the service is killed no more.
KILLS = 5


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    values = {
        "state": str(tmp_path / "state"),
        "results": str(tmp_path / "jobs"),
        "data_roots": [str(tmp_path)],
        "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
        "cpus": 1,
        "gpus": 0,
        "poll_s": 0.2,
    }
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


@pytest.fixture
def desk(folder: Path) -> Iterator[Desk]:
    made = Desk(settings_file.load(folder / "service.yaml"))
    yield made
    for job in Record(made.settings).open_jobs():
        kill_attempt(made, job)


@pytest.fixture
def controller(desk: Desk) -> Iterator[Controller]:
    made = Controller(desk)
    made.start()
    yield made
    made.stop()


def spec(folder: Path, steps: int = STEPS, **fields: Any) -> JobSpec:
    """The small job, on one worker and without what the service decides."""
    config = yaml.safe_load(CONFIG.format(root=folder, steps=steps, every=LOG_EVERY))
    del config["output"], config["tracking"]["uri"]
    config |= {"workers": 1, "grace_s": 10, "registry": {"name": "tiny"}}
    return JobSpec(**{"name": "small", "config": config, **fields})


def begun(desk: Desk, job: Job) -> dict[str, Any]:
    number = 0 if job.attempt is None else job.attempt.number
    return runner.read(orders.attempt_folder(desk.settings, job.id, number) / runner.BEGUN)


def kill_attempt(desk: Desk, job: Job) -> None:
    """All of it at once, the runner first, so that nobody can say a word."""
    told = begun(desk, job)
    for process in family(told["runner"]["pid"]) if "runner" in told else []:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def await_state(desk: Desk, job: Job, state: str, seconds: float = 150) -> Job:
    def told() -> str:
        return f"{desk.get(job.id)}\n{b''.join(desk.logs(job.id, tail=30)).decode()}"

    await_(lambda: desk.get(job.id).state == state, f"job {state}", seconds, told)
    return desk.get(job.id)


def await_checkpoint(desk: Desk, job: Job, above: int = 0) -> None:
    checkpoints = orders.folder_of(desk.settings, job.id) / "run" / "checkpoints"

    def newest() -> int:
        return max([int(path.name[5:]) for path in checkpoints.glob("step-*") if path.name[5:].isdigit()], default=0)

    await_(lambda: newest() > above, "a further checkpoint", 120, lambda: b"".join(desk.logs(job.id)).decode())


def log_of(desk: Desk, job: Job, attempt: int) -> str:
    return b"".join(desk.logs(job.id, attempt=attempt)).decode()


def test_a_training_is_cancelled_resumed_killed_and_gone_on_with_to_its_registered_model(
    desk: Desk, controller: Controller, folder: Path
) -> None:
    job, _ = desk.submit(spec(folder), owner="ada", key="one")
    await_checkpoint(desk, job)
    desk.cancel(job.id)
    stopped = await_state(desk, job, "killed")
    assert (stopped.reason, stopped.attempts[0].exit_code) == ("cancelled", 75)
    desk.resume(job.id)
    await_(lambda: "going on from step" in log_of(desk, job, desk.get(job.id).attempts[-1].number), "resumed", 90)
    await_(lambda: desk.get(job.id).state == "running", "running", 30)
    kill_attempt(desk, desk.get(job.id))
    finished = await_state(desk, job, "finished")
    assert [attempt.exit_code for attempt in finished.attempts] == [75, None, 0]
    assert finished.failures == 1
    for attempt in (2, 3):
        assert int(re.findall(r"going on from step (\d+)", log_of(desk, job, attempt))[0]) >= 4
    # One run in MLflow, which all attempts wrote to, with one point for each step; and its model.
    api = store.client(desk.settings.tracking_uri)
    run = api.get_run(job.id)
    assert (run.info.status, run.data.tags["lorot.resumed"]) == ("FINISHED", "2")
    assert len(api.search_runs([run.info.experiment_id])) == 1
    steps = [point.step for point in api.get_metric_history(job.id, "train/loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    [version] = api.search_model_versions("name='tiny'")
    assert (version.run_id, version.tags["run_name"]) == (job.id, "small")
    kept = {file.path for file in api.list_artifacts(job.id, "attempts/3")} | {
        file.path for file in api.list_artifacts(job.id)
    }
    assert kept >= {"attempts/3/log-node0.txt", "job.yaml", "config.yaml", "model"}
    assert desk.progress(job.id)["share"] == 1.0
    with pytest.raises(StateError):
        desk.retry(job.id)
    assert desk.submit(spec(folder), owner="ada", key="one") == (finished, False)


def test_bad_data_fails_at_once_in_the_launcher_s_words_and_a_retry_begins_anew(
    desk: Desk, controller: Controller, folder: Path
) -> None:
    wrong = spec(folder)
    wrong.config["data"] = {"name": "prepared", "root": str(folder / "nothing"), "size": 32}
    job, _ = desk.submit(wrong)
    failed = await_state(desk, job, "failed")
    assert (failed.attempts[0].exit_code, failed.failures) == (3, 1)
    assert str(folder / "nothing") in failed.reason
    desk.retry(job.id)
    failed = await_state(desk, job, "failed")
    await_(lambda: len(desk.get(job.id).attempts) == 2, "another attempt", 60)
    assert store.client(desk.settings.tracking_uri).get_run(job.id).info.status == "FAILED"


def test_the_service_killed_at_random_moments_starts_each_attempt_once_and_loses_no_job(
    desk: Desk, folder: Path
) -> None:
    # More would take longer, not show more: the tests of the controller go through each moment.
    seed = int(os.environ.get("LOROT_SEED", time.time_ns() % 10**6))
    chance = random.Random(seed)
    jobs = [desk.submit(spec(folder, 16, name=name, priority=9 - at), key=name)[0] for at, name in enumerate("ab")]
    line = [sys.executable, "-m", "tests.integration.job_controller", str(folder / "service.yaml")]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def has_ended() -> bool:
        # Read anew: this process's memory is not the service's.
        fresh = Record(desk.settings)
        return all(fresh.get(job.id).has_ended for job in jobs)

    for _ in range(KILLS):
        process = start()
        try:
            if chance.random() < 0.8:
                assert process.stdout is not None
                assert process.stdout.readline() == "begun\n", "the service has ended by itself"
            # In the middle of its start, or some rounds after it.
            time.sleep(chance.uniform(0.0, 3.0))
        finally:
            process.kill()
            process.wait()
    process = start()
    try:
        await_(has_ended, "the end of both jobs", 400, lambda: f"seed {seed}: {Record(desk.settings).jobs()}")
    finally:
        process.kill()
        process.wait()
    after = Desk(desk.settings)
    for job in jobs:
        found = after.get(job.id)
        assert (found.state, len(found.attempts), found.failures) == ("finished", 1, 0), f"seed {seed}: {found}"
        assert log_of(after, found, 1).count("starting 1 worker") == 1, f"seed {seed}"
    first, second = (after.get(job.id).attempts[0] for job in jobs)
    assert first.ended_s <= second.started_s, "one core: one after the other"
    versions = store.client(desk.settings.tracking_uri).search_model_versions("name='tiny'")
    assert sorted(version.run_id for version in versions) == sorted(job.id for job in jobs)
