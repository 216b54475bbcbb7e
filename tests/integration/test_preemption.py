"""A machine is taken away: signals to a worker, to torchrun, to `lorot train`, at every moment of a real job's life."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.training import checkpoint
from tests.integration.processes import await_, family, workers
from tests.integration.small_job import finish, prepare, records, start

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("preempted"))


def until(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    await_(lambda: condition() or job.poll() is not None, "what is to be disturbed", 400)
    assert job.poll() is None, "it ended early"


def steps_begun(folder: Path) -> int:
    log = folder / "samples-rank0.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def newest(folder: Path) -> checkpoint.Checkpoint:
    found, problems = checkpoint.newest(folder / "checkpoints")
    assert problems == []
    assert found is not None
    return found


def told(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "error.json").read_text())
    return content


def under_torchrun(root: Path, name: str, shutdown_s: int, *arguments: str) -> subprocess.Popen[str]:
    """A job without `lorot train`, and torchrun's own limit from a signal to the kill."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", str(shutdown_s)]
    line += ["-m", "service.training.worker", str(root / "job.yaml"), f"name={name}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_signal_to_one_worker_in_an_evaluation_stops_all_soon_and_the_evaluation_is_made_up_for(root: Path) -> None:
    # Of 3000 images: a minute on a slow machine, if it were awaited.
    long = ("duration=4 steps", "evaluate_every=2 steps", "micro_batch=2", "data.eval_split=val")
    large = ("data.options={train_count: 203, val_count: 1500, size: 40}", f"data.root={root}/large")
    job = start(root, "evaluating", *long, *large)
    folder = root / "runs" / "evaluating"
    # What a worker says of its phase is seconds old, and a fast machine may be done by then.
    until(lambda: steps_begun(folder) == 2, job)
    time.sleep(0.2)
    workers(job.pid)[1].send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 75, said
    assert told(folder)["exit_code"] == 75
    found = newest(folder)
    assert found.step == 2
    assert found.facts["progress"]["owes_evaluation"]
    assert not (folder / "metrics.jsonl").exists() or not any("val/top1" in one for one in records(root, "evaluating"))
    finish(root, "evaluating", *long, *large, "--resume")
    finish(root, "evaluated", *long, *large)
    assert records(root, "evaluating") == records(root, "evaluated")


def test_three_signals_to_torchrun_do_not_damage_the_save(root: Path) -> None:
    # Too long to end before the signals come, wherever this process has to wait for its turn.
    job = under_torchrun(root, "thrice", 110, "grace_s=120", "duration=100000 steps")
    folder = root / "runs" / "thrice"
    until(lambda: steps_begun(folder) >= 6, job)
    started = family(job.pid)[1:]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        job.send_signal(number)
        time.sleep(0.3)
    job.communicate(timeout=300)
    # Torchrun may have left them behind by now; they end by themselves.
    _, alive = psutil.wait_procs(started, timeout=150)
    assert alive == []
    assert told(folder)["exit_code"] == 75
    assert f"stopped after step {newest(folder).step};" in told(folder)["message"]
    assert newest(folder).step >= 6


def test_a_signal_while_the_job_is_starting_ends_it_at_once_with_nothing_lost(root: Path) -> None:
    # Where this process has to wait for its turn just then, the job has begun: not the moment that is meant.
    for number in range(5):
        name = f"starting-{number}"
        folder = root / "runs" / name
        # A worker that still looks for the other one ends with the grace period only, seconds before a kill.
        job = start(root, name, "grace_s=60", "duration=100000 steps")
        until((folder / "log-rank1.txt").exists, job)
        job.send_signal(signal.SIGTERM)
        said, _ = job.communicate(timeout=300)
        assert job.returncode == 75, said
        if steps_begun(folder) <= 1:
            break
    assert steps_begun(folder) <= 1


def test_when_the_grace_period_ends_before_the_step_the_job_says_so_and_the_last_checkpoint_stays(root: Path) -> None:
    # A wide network: a step takes a minute, far longer than the second that a grace period of three leaves to the
    # worker. Torchrun waits for longer than under `lorot train`, where a slow machine has no time for the last words.
    slow = ("grace_s=3", "duration=3 steps", "global_batch=1024", "model.width=256", "checkpoint.every=1 steps")
    job = under_torchrun(root, "slow", 60, *slow, "log_samples=false")
    folder = root / "runs" / "slow"
    until(lambda: (folder / "samples.png").exists(), job)
    time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=300)
    assert told(folder)["exit_code"] == 75, said
    assert "1 s after SIGTERM the step, or the saving after it, had not ended" in told(folder)["message"]
    assert "the start (no checkpoint yet) is the newest" in told(folder)["message"]
