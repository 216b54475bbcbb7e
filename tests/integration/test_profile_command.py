"""`lorot profile` as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.integration


def test_a_real_job_is_profiled_on_two_workers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        """
global_batch: 32
micro_batch: 8
workers: 2
device: cpu
data: {name: demo, root: drawn, options: {train_count: 96, val_count: 10, size: 64}, size: 32}
pretext: {name: lorot_e}
objective: {name: multi_task}
model: {name: resnet_small, width: 16}
"""
    )
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
