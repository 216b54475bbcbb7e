"""`lorot profile` as a user starts it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.processes import await_, workers

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.integration


JOB = """
global_batch: 32
micro_batch: 8
workers: 2
device: cpu
data: {name: demo, root: drawn, options: {train_count: 96, val_count: 10, size: 64}, size: 32}
pretext: {name: lorot_e}
objective: {name: multi_task}
model: {name: resnet_small, width: 16}
"""


def test_a_real_job_is_profiled_on_two_workers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    line = [sys.executable, "-m", "service.cli", "profile", "job.yaml", "--steps", "3", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Three steps of 32 images, over both workers; in micro-batches of 8 each has two to a step.
    assert [found[name]["images"] for name in ("loader", "step", "both")] == [96, 96, 96]
    assert (found["setting"]["workers"], found["setting"]["accumulation"]) == (2, 2)
    assert found["setting"]["source_pixels"] == 64 * 64
    # The step alone has its batches at hand.
    assert found["step"]["wait_s"] / found["step"]["seconds"] < 0.3
    assert all(found[name]["cpu_s"] > 0 for name in ("loader", "step", "both"))
    assert found["bottleneck"] in ("storage", "loader", "cores", "bursts", "step")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "job.yaml"]


def test_a_job_that_cannot_run_is_refused_as_training_would_refuse_it(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("data: {name: folder, root: nowhere}\nglobal_batch: 8\nmicro_batch: 8\n")
    line = [sys.executable, "-m", "service.cli", "profile", "job.yaml", "device=cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stderr
    assert "nowhere" in done.stderr


def test_a_worker_that_freezes_is_named_and_ends_the_profile(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    folders = tmp_path / "tmp"
    folders.mkdir()
    line = [sys.executable, "-m", "service.cli", "profile", "job.yaml", "timeout_s=40", "--steps", "1500"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folders)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    profile = subprocess.Popen(line, cwd=tmp_path, env=env, text=True, **pipes)  # type: ignore[call-overload]
    try:
        signs = "lorot-profile-*/*/workers/rank1.json"
        # While the loader is measured by itself nobody waits for another.
        await_(lambda: any("measuring the step" in one.read_text() for one in folders.glob(signs)), "it steps", 180)
        alive = workers(profile.pid)
        alive[1].send_signal(signal.SIGSTOP)
        _, said = profile.communicate(timeout=400)
    finally:
        for process in workers(profile.pid).values():
            process.kill()
        profile.kill()
    assert profile.returncode == 8, said
    assert "worker 1 stopped answering within timeout_s=40" in said
    assert "measuring the step" in said
    assert not any(worker.is_running() for worker in alive.values())
    assert list(folders.glob("lorot-profile-*")) == []
