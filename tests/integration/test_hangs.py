"""Jobs that hang: every worker ends within the timeout, says why, and nothing stays behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from machines import ROOT
from PIL import Image

from service import tracking
from service.run_folder import RunFolder
from tests.integration.processes import await_, workers

pytestmark = pytest.mark.integration

# Of a start's collective operations too, which a slow machine has to be done with by then.
TIMEOUT_S = 40
JOB = f"""
name: job
output: runs
duration: 100000 steps
evaluate_every: 100000 steps
global_batch: 32
micro_batch: 8
workers: 2
device: cpu
timeout_s: {TIMEOUT_S}
grace_s: 6
log_samples: true
data: {{size: 32}}
model: {{name: resnet_small, width: 8}}
optimizer: {{lr: 0.01}}
checkpoint: {{every: 1000 steps}}
tracking: {{uri: "sqlite:///mlflow.db", log_every: 1000 steps, system_metrics: false}}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tracking.ensure_ready("sqlite:///mlflow.db")
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


@pytest.fixture
def job(place: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """The jobs that a test starts; none outlives it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                member.kill()
            process.wait()


def start(started: list[subprocess.Popen[str]], *overrides: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "service.cli", "train", "job.yaml", *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started.append(subprocess.Popen(line, env=environment, text=True, **pipes))  # type: ignore[call-overload]
    return started[-1]


def steps(place: Path) -> int:
    path = place / "runs/job/samples-rank0.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def has_stack(log: str) -> bool:
    """Whether a worker's log shows where it was: of the operation that failed, or of all its threads."""
    return bool(re.search(r"what each thread was doing:|Traceback \(most recent call last\)", log)) and bool(
        re.search(r"in (train|_train|all_sum|\w*reduce\w*)$", log, re.MULTILINE)
    )


DEMO = "data={name: demo, root: demo, size: 32, options: {train_count: 64, val_count: 20, size: 40}}"


def test_a_frozen_worker_is_named_by_the_others_and_does_not_stay_behind(
    place: Path, job: list[subprocess.Popen[str]]
) -> None:
    launcher = start(job, DEMO, "workers=3", "global_batch=24")
    signs = place / "runs/job/workers"

    def all_train() -> bool:
        return len([sign for sign in signs.glob("rank?.json") if '"phase": "training"' in sign.read_text()]) == 3

    await_(lambda: all_train() or launcher.poll() is not None, "training", 300)
    assert launcher.poll() is None, launcher.communicate()
    alive = workers(launcher.pid)
    frozen_at = time.monotonic()
    alive[1].send_signal(signal.SIGSTOP)
    await_((place / "runs/job/error.json").exists, "the others say so", TIMEOUT_S + 120)
    noticed_s = time.monotonic() - frozen_at
    _, said = launcher.communicate(timeout=300)
    print(f"noticed {noticed_s:.1f} s after the freeze with timeout_s={TIMEOUT_S}")
    assert launcher.returncode == 8, said
    assert f"worker 1 stopped answering within timeout_s={TIMEOUT_S}" in said
    # Of each, the frozen one included, its step and its place.
    for rank in range(3):
        assert re.search(rf"^  worker {rank}: step \d+, training for \d+ s, at \w+\.py:\d+ ", said, re.MULTILINE), said
    for rank in (0, 2):
        log = (place / f"runs/job/log-rank{rank}.txt").read_text()
        assert has_stack(log), log
    assert not any(worker.is_running() for worker in alive.values())


def test_a_worker_whose_data_never_come_says_where_it_hangs(place: Path, job: list[subprocess.Popen[str]]) -> None:
    """A named pipe that nobody writes to behaves as a file on a disk that does not answer."""
    for split, count in (("train", 64), ("val", 8)):
        for number in range(count):
            path = place / "images" / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (number, 0, 0)).save(path)
    launcher = start(job, "data={name: folder, root: images, size: 32}", "evaluate_every=100000 steps")
    await_(lambda: steps(place) > 20 or launcher.poll() is not None, "training", 300)
    assert launcher.poll() is None, launcher.communicate()
    stuck = place / "images/train/class0/0.png"
    stuck.unlink()
    os.mkfifo(stuck)
    _, said = launcher.communicate(timeout=TIMEOUT_S + 300)
    assert launcher.returncode in (1, 8), said
    assert "waiting for a batch" in said
    # The one that hung wrote all of its threads' stacks.
    logs = [(place / f"runs/job/log-rank{rank}.txt").read_text() for rank in range(2)]
    assert any("no progress for" in log and "Thread 0x" in log for log in logs), said
    assert json.loads((place / "runs/job/error.json").read_text())["exit_code"] == launcher.returncode


def test_a_worker_alone_that_freezes_is_ended_by_its_launcher_and_resumed(
    place: Path, job: list[subprocess.Popen[str]]
) -> None:
    short = [DEMO, "workers=1", "timeout_s=8", "duration=800 steps", "checkpoint.every=20 steps"]
    launcher = start(job, *short)
    await_(lambda: steps(place) > 40 or launcher.poll() is not None, "training", 300)
    assert launcher.poll() is None, launcher.communicate()
    [alive] = workers(launcher.pid).values()
    alive.send_signal(signal.SIGSTOP)
    _, said = launcher.communicate(timeout=300)
    assert launcher.returncode == 8, said
    assert "worker 0 stood still for 8 s, stopped by a signal such as SIGSTOP; --resume goes on" in said
    assert not alive.is_running()
    assert not RunFolder(place / "runs/job").end
    resumed = start(job, *short, "--resume")
    assert resumed.wait(300) == 0, resumed.communicate()
    assert RunFolder(place / "runs/job").end, "what tells launchers that all was done"
