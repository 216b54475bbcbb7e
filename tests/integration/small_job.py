"""A job of seconds on two workers, started as a user does, and what it leaves behind: for tests that disturb it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from service import store
from tests.integration import sample_logs

STEPS = 40
LOG_EVERY = 3
CONFIG = """
output: {root}/runs
duration: {steps} steps
evaluate_every: 9 steps
global_batch: 16
micro_batch: 4
workers: 2
device: cpu
precision: fp32
deterministic: true
log_samples: true
data:
  name: demo
  root: {root}/demo
  options: {{train_count: 203, val_count: 29, size: 40}}
  size: 32
  eval_crop: 1.0
  loader: torch
pretext: {{name: lorot_e}}
objective: {{name: multi_task}}
model: {{name: resnet_small, width: 8}}
optimizer: {{lr: 0.05}}
ema: {{decay: 0.9}}
checkpoint: {{every: 4 steps}}
tracking: {{uri: "sqlite:///{root}/mlflow.db", log_every: {every} steps, system_metrics: false}}
registry: {{name: ""}}
"""
# What the clock and the machine put into a record.
MEASURED = ("time_s", "train/images_per_s", "val/images_per_s", "train/data_wait_share", "train/memory_bytes")


def prepare(folder: Path) -> Path:
    """Put a configuration and an empty tracking database into `folder`."""
    store.ensure_ready(f"sqlite:///{folder}/mlflow.db")
    (folder / "job.yaml").write_text(CONFIG.format(root=folder, steps=STEPS, every=LOG_EVERY))
    return folder


def start(root: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "service.cli", "train", str(root / "job.yaml"), f"name={name}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(root: Path, name: str, *arguments: str) -> None:
    job = start(root, name, *arguments)
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 0, said


def tensors(root: Path, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    parts = sorted((root / "runs" / name / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    averages = yaml.safe_load((root / "runs" / name / "config.yaml").read_text())["ema"] is not None
    assert {part.stem for part in parts} == {"optimizer", "weights"} | ({"ema"} if averages else set())
    return {f"{part.stem}/{key}": value for part in parts for key, value in load_file(part).items()}


def records(root: Path, name: str) -> list[dict[str, Any]]:
    lines = (root / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in MEASURED and "step_time" not in key}
        for line in lines
    ]


def samples(root: Path, name: str) -> dict[int, list[tuple[int, ...]]]:
    """The micro-batches of each step, of all workers, by the latest attempt at it."""
    return sample_logs.by_step(root / "runs" / name)


def same(root: Path, name: str, whole: str, context: str, step: int = STEPS) -> None:
    """Assert that a run has left what another one did by their last step; `context` is said of a difference."""
    expected, got = tensors(root, whole, step), tensors(root, name, step)
    assert got.keys() == expected.keys(), context
    for key, value in expected.items():
        assert torch.equal(got[key], value), f"{key}; {context}"
    assert records(root, name) == records(root, whole), context
    assert samples(root, name) == samples(root, whole), context
