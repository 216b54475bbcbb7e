"""A small training job as a user starts it, whose record the tests look at."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.run_folder import RunFolder
from tests.integration.processes import await_


def write_config(folder: Path, uri: str, steps: int) -> RunFolder:
    """`job.yaml` in `folder`; returns where its run will lie."""
    (folder / "job.yaml").write_text(
        f"""
name: job
output: {folder}/runs
duration: {steps} steps
evaluate_every: {steps} steps
global_batch: 8
micro_batch: 8
workers: 1
device: cpu
data: {{name: demo, root: {folder}/demo, size: 32, options: {{train_count: 64, val_count: 16, size: 40}}}}
model: {{name: resnet_small, width: 8}}
checkpoint: {{every: 20 steps}}
tracking: {{uri: "{uri}", log_every: 1 steps, system_metrics: false}}
registry: {{name: small}}
"""
    )
    return RunFolder(folder / "runs" / "job")


def lorot(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start the command."""
    line = [sys.executable, "-m", "service.cli", *arguments]
    root = Path(__file__).resolve().parents[2]
    with (folder / "said.txt").open("a") as said:
        return subprocess.Popen(line, cwd=root, stdout=said, stderr=subprocess.STDOUT, text=True)


def steps_done(run: RunFolder) -> int:
    """Of its metrics file."""
    return max((int(line["step"]) for line in lines_of(run)), default=0)


def lines_of(run: RunFolder) -> list[dict[str, Any]]:
    """The records of its metrics file; one that is being written is left out."""
    if not run.metrics.exists():
        return []
    return [json.loads(line) for line in run.metrics.read_text().split("\n")[:-1]]


def wait_until(happened: Callable[[], bool], folder: Path, timeout_s: float = 300) -> None:
    """Wait for it."""
    await_(happened, "what the test waits for", timeout_s, lambda: (folder / "said.txt").read_text()[-3000:])
