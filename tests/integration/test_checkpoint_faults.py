"""A disk that is full or read-only, two jobs on one folder, a damaged checkpoint: what real jobs make of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import tracking
from service.training import checkpoint
from tests.integration.processes import await_

pytestmark = pytest.mark.integration

LONG = "100000 steps"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    uri = f"sqlite:///{folder}/mlflow.db"
    tracking.ensure_ready(uri)
    (folder / "job.yaml").write_text(
        f"""
output: {folder}/runs
duration: 6 steps
evaluate_every: {LONG}
global_batch: 16
micro_batch: 8
workers: 2
device: cpu
data:
  name: demo
  root: {folder}/demo
  options: {{train_count: 64, val_count: 16, size: 40}}
  size: 32
  loader: torch
model: {{name: resnet_small, width: 16}}
optimizer: {{lr: 0.01}}
schedule: {{warmup: 0 steps}}
ema: {{decay: 0.9}}
checkpoint: {{every: 2 steps}}
tracking: {{uri: "{uri}", log_every: {LONG}, system_metrics: false}}
registry: {{name: ''}}
"""
    )
    return folder


def lorot(place: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "service.cli", "train", str(place / "job.yaml"), *arguments]


def torchrun(place: Path, *arguments: str) -> list[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return [*line, "service.training.worker", str(place / "job.yaml"), *arguments]


def run(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})


@contextlib.contextmanager
def running(line: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A job in a process group of its own, all of which is ended with the block."""
    quiet = subprocess.DEVNULL
    job = subprocess.Popen(
        line, stdout=quiet, stderr=quiet, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        yield job
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGTERM)
        try:
            job.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait(60)


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A disk of 6 MB of its own; a checkpoint of the job has about 2."""
    disk = place / "disk"
    disk.mkdir(exist_ok=True)
    line = ["mount", "-t", "tmpfs", "-o", "size=6m", "lorot-test", str(disk)]
    mounted = subprocess.run(line, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_ends_the_job_on_every_worker_and_with_room_it_goes_on(
    place: Path, small_disk: Path
) -> None:
    arguments = ["name=full", f"output={small_disk}", "duration=12 steps", "checkpoint.every=2 steps"]
    ballast = small_disk / "ballast"
    # With this the first checkpoint fits and the second does not, at whatever speed the job runs.
    ballast.write_bytes(bytes(3 * 1024**2))
    checkpoints = small_disk / "full" / "checkpoints"
    done = run(lorot(place, *arguments))
    assert done.returncode == 7, done.stderr
    said = json.loads((small_disk / "full" / "error.json").read_text())
    assert "No space left on device" in said["message"]
    assert "the ones before are untouched" in said["message"]
    for rank in (0, 1):
        assert "No space left" in (small_disk / "full" / f"log-rank{rank}.txt").read_text(), "every worker says so"
    found, problems = checkpoint.newest(checkpoints)
    assert problems == []
    assert found is not None
    assert 0 < found.step < 12

    ballast.unlink()
    done = run(lorot(place, *arguments, "--resume"))
    assert done.returncode == 0, done.stderr
    assert checkpoint.newest(checkpoints)[0].step == 12  # type: ignore[union-attr]


def test_a_read_only_disk_is_told_before_anything_starts_and_leaves_what_is_there(
    place: Path, small_disk: Path
) -> None:
    arguments = ["name=once", f"output={small_disk}", "duration=2 steps"]
    done = run(torchrun(place, *arguments))
    assert done.returncode == 0, done.stderr
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = sorted(small_disk.rglob("*"))
    for line in (lorot(place, *arguments, "--resume"), torchrun(place, *arguments, "--resume")):
        done = run(line)
        assert done.returncode != 0
        assert "cannot be written (Read-only file system)" in done.stderr
    assert sorted(small_disk.rglob("*")) == before
    assert checkpoint.newest(small_disk / "once" / "checkpoints")[0] is not None


def test_a_second_job_on_a_folder_is_refused_however_either_was_started(place: Path) -> None:
    folder = place / "runs" / "shared"
    with running(torchrun(place, "name=shared", f"duration={LONG}", "checkpoint.every=1 steps")) as first:
        await_(lambda: bool(checkpoint.find(folder / "checkpoints")), "its first checkpoint", 300)
        for line in (
            torchrun(place, "name=shared", f"duration={LONG}", "--resume"),
            lorot(place, "name=shared", f"duration={LONG}", "--resume"),
            lorot(place, "name=shared", f"duration={LONG}", "--restart"),
        ):
            done = run(line)
            assert done.returncode != 0
            assert "another job runs there (process" in done.stdout + done.stderr, line
        assert first.poll() is None, "the first goes on"
        reached = checkpoint.find(folder / "checkpoints")[0]
        await_(lambda: checkpoint.find(folder / "checkpoints")[0] > reached, "more checkpoints", 300)
    with running(lorot(place, "name=shared", f"duration={LONG}", "--resume")) as second:
        reached = checkpoint.find(folder / "checkpoints")[0]
        await_(lambda: checkpoint.find(folder / "checkpoints")[0] > reached, "the next job to go on", 300)
        assert second.poll() is None


def test_a_damaged_newest_checkpoint_is_passed_over_and_its_weights_can_start_another_run(place: Path) -> None:
    done = run(lorot(place, "name=damaged", "--workers", "1"))
    assert done.returncode == 0, done.stderr
    folder = place / "runs" / "damaged"
    newest, older = checkpoint.find(folder / "checkpoints")
    file = newest / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    done = run(lorot(place, "name=damaged", "--workers", "1", "--resume"))
    assert done.returncode == 0, done.stderr
    assert "going on from step 4 of 6" in done.stdout + done.stderr
    assert f"passed over: {file}: its SHA-256" in (folder / "log-rank0.txt").read_text()
    assert checkpoint.newest(folder / "checkpoints")[0].path == newest  # type: ignore[union-attr]

    done = run(lorot(place, "name=young", "--workers", "1", "--init-from", str(folder), "duration=1 steps"))
    assert done.returncode == 0, done.stderr
    assert f"tensors from {folder}" in done.stdout + done.stderr
    assert older.exists() or len(checkpoint.find(folder / "checkpoints")) == 2
