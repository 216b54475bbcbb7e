"""The whole training job as a user starts it: real torchrun, two DeepSpeed workers, DALI, MLflow on SQLite."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import datasets, loading, pretext
from pipelines.plan import View
from service import config, registry, tracking
from service.run_folder import RunFolder
from tests.integration import stand_in_worker

STEPS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    uri = f"sqlite:///{folder}/mlflow.db"
    tracking.ensure_ready(uri)
    (folder / "job.yaml").write_text(
        f"""
name: whole
output: {folder}/runs
duration: {STEPS} steps
evaluate_every: 30 steps
global_batch: 32
micro_batch: 8
workers: 2
device: cpu
data:
  name: demo
  root: {folder}/demo
  options: {{train_count: 203, val_count: 61, size: 40}}
  size: 32
  eval_crop: 1.0
pretext: {{name: lorot_e}}
objective: {{name: multi_task}}
model: {{name: resnet_small, width: 16}}
optimizer: {{lr: 0.05}}
ema: {{decay: 0.9}}
checkpoint: {{every: 10 steps}}
tracking: {{uri: "{uri}", log_every: 10 steps, system_metrics: false}}
registry: {{name: whole}}
"""
    )
    return folder


def command(place: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "service.cli", "train", str(place / "job.yaml"), *arguments]


def train(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(place, *arguments), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    done = train(place)
    assert done.returncode == 0, done.stderr
    folder = place / "runs" / "whole"
    # What a run leaves on the screen is its own; DeepSpeed's and MLflow's banners are in the log.
    assert "deepspeed" not in (done.stdout + done.stderr).lower()
    assert "alembic" not in (done.stdout + done.stderr).lower()
    return folder


# The job as it is, but for workers that wait after step 20 until they are asked to stop: on a busy machine they might
# have trained to the end by then.
WAITING = """
import sys, time
from service.training import keeper, signals, worker

asked = []

def hear(self, number, frame, real=signals.Signals._hear):
    asked.append(number)
    real(self, number, frame)

def step(self, done, real=keeper.RunKeeper.step):
    real(self, done)
    while done == 20 and not asked:
        time.sleep(0.01)

signals.Signals._hear, keeper.RunKeeper.step = hear, step
sys.exit(worker.main())
"""


def tensors(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    parts = sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    assert [part.stem for part in parts] == ["ema", "optimizer", "weights"]
    return {f"{part.stem}/{name}": value for part in parts for name, value in load_file(part).items()}


def test_a_run_stopped_at_a_step_and_resumed_ends_bit_identical(whole: Path, place: Path) -> None:
    job = stand_in_worker.start(place, WAITING, str(place / "job.yaml"), "name=stopped")
    stopped = place / "runs" / "stopped"
    deadline = time.monotonic() + 200
    while not (stopped / "checkpoints" / "step-00000010").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 75, said
    last = max(int(path.name[5:]) for path in (stopped / "checkpoints").glob("step-*"))
    assert 10 <= last < STEPS
    assert not (stopped / "summary.json").exists()

    done = train(place, "name=stopped", "--resume")
    assert done.returncode == 0, done.stderr
    expected, got = tensors(whole), tensors(stopped)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    steps = [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()]


def test_one_worker_trains_on_the_same_samples_to_nearly_the_same_weights(whole: Path, place: Path) -> None:
    done = train(place, "name=alone", "--workers", "1", "duration=5 steps", "registry.name=''")
    assert done.returncode == 0, done.stderr
    two = train(place, "name=pair", "duration=5 steps", "registry.name=''")
    assert two.returncode == 0, two.stderr
    alone, pair = tensors(place / "runs" / "alone", 5), tensors(place / "runs" / "pair", 5)
    for name, value in alone.items():
        # BatchNorm's running statistics are averaged over workers, and are not the same arithmetic.
        if name.startswith("weights/") and "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(pair[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_the_run_folder_holds_what_the_report_and_the_registry_need(whole: Path, place: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    confusion = json.loads((whole / "confusion.json").read_text())
    assert sum(map(sum, confusion["matrix"])) == 61, "every held-out sample counts once, though 61 is no multiple of 16"
    assert summary["images"] == STEPS * 32
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for record in records for key, value in record.items()}
    measured = {"loss", "class_loss", "pretext_loss", "top1", "top5", "pretext_accuracy", "lr", "grad_norm", "epoch"}
    measured |= {"images_per_s", "data_wait_share", "step_time_p50_s", "step_time_p95_s", "memory_bytes"}
    assert last.keys() >= {f"train/{name}" for name in measured}
    assert last.keys() >= {"val/top1", "val/top5", "val/class_loss", "val/images_per_s"}
    assert (whole / "samples.png").stat().st_size > 1000
    uri = config.load(place / "job.yaml").tracking.uri
    model, card, resolved = registry.load("models:/whole@latest", uri)
    assert resolved.run_id is not None
    assert card.metrics["val/top1"] == summary["metrics"]["val/top1"]
    ema = {
        name[len("ema/module.") :]: value for name, value in tensors(whole).items() if name.startswith("ema/module.")
    }
    assert all(torch.equal(value, ema[name]) for name, value in model.state_dict().items())


def test_the_registered_model_scores_what_was_measured(whole: Path, place: Path) -> None:
    # With an average of weights the two workers would otherwise evaluate two networks and register one of them.
    job = config.load(place / "job.yaml")
    summary = json.loads((whole / "summary.json").read_text())
    model, card, _ = registry.load("models:/whole@latest", job.tracking.uri)
    manifest = datasets.load("demo", job.data.root, "val", **job.data.options)
    source = loading.Source(manifest, View(**card.view), pretext.load("none"), seed=0)
    total = 0.0
    with torch.inference_mode(), loading.open_eval("dali", source, batch_size=61, num_threads=1) as batches:
        for batch in batches:
            total += float(torch.nn.functional.cross_entropy(model(batch.images).logits, batch.labels, reduction="sum"))
    assert total / 61 == pytest.approx(summary["metrics"]["val/class_loss"], abs=1e-5)


def test_a_run_that_died_before_its_first_checkpoint_does_not_mix_with_the_next(place: Path) -> None:
    short = (
        "name=early",
        "duration=4 steps",
        "tracking.log_every=1 steps",
        "checkpoint.every=null",
        "registry.name=''",
    )
    dead = train(place, *short, "optimizer.lr=1e30", "schedule.warmup=0 steps")
    assert dead.returncode == 4, dead.stderr
    folder = RunFolder(place / "runs" / "early")
    first = folder.read("run.json")["run_id"]
    done = train(place, *short)
    assert done.returncode == 0, done.stderr
    assert folder.read("run.json")["run_id"] != first
    steps = [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4]


def test_mlflow_has_one_run_with_parameters_metrics_and_files(whole: Path, place: Path) -> None:
    job = config.load(place / "job.yaml")
    api = tracking.client(job.tracking.uri)
    run_id = RunFolder(whole).read("run.json")["run_id"]
    run = api.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["pretext.name"] == "lorot_e"
    assert [point.step for point in api.get_metric_history(run_id, "train/loss")] == list(range(10, STEPS + 1, 10))
    assert {file.path for file in api.list_artifacts(run_id)} >= {"config.yaml", "samples.png", "summary.json", "model"}
    experiment = api.get_experiment_by_name(job.tracking.experiment)
    names = [found.info.run_name for found in api.search_runs([experiment.experiment_id])]
    assert names.count("whole") == 1, "one run per job, whatever the number of workers"


def test_an_earlier_run_is_not_overwritten(whole: Path, place: Path) -> None:
    before = (whole / "summary.json").read_bytes()
    done = train(place)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert "--restart" in done.stderr
    assert (whole / "summary.json").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_all_workers_and_names_step_samples_and_checkpoint(place: Path) -> None:
    done = train(place, "name=diverged", "optimizer.lr=1e30", "schedule.warmup=0 steps", "checkpoint.every=1 steps")
    assert done.returncode == 4, done.stderr
    assert "not finite at step" in done.stderr
    assert "samples" in done.stderr
    assert "checkpoint" in done.stderr
    api = tracking.client(config.load(place / "job.yaml").tracking.uri)
    assert api.get_run(RunFolder(place / "runs" / "diverged").read("run.json")["run_id"]).info.status == "FAILED"


def test_a_changed_job_is_not_resumed_silently(whole: Path, place: Path) -> None:
    done = train(place, "--resume", "seed=1")
    assert done.returncode == 5
    assert "seed: 0 then, 1 now" in done.stderr


def test_torchrun_starts_the_workers_and_the_best_evaluation_is_saved_off_schedule(place: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    line += ["service.training.worker", str(place / "job.yaml"), "name=direct", "duration=2 steps", "registry.name=''"]
    line += ["evaluate_every=1 steps", "checkpoint.every=null"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (place / "runs" / "direct" / "summary.json").exists()
    # The first evaluation is the best so far; the last step is saved in any case.
    assert (place / "runs" / "direct" / "checkpoints" / "step-00000001").exists()
