"""`lorot detect` and `lorot segment` as a user starts them: torchrun, two DeepSpeed workers, drawn scenes, MLflow."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipelines.drawing import coco_export
from service import bundle, detector_bundle, registry, store, tracking, transfer
from service.config import TrackingConfig
from tests.integration.processes import await_, family, workers
from tests.integration.small_detectors import RETINANET, SOLOV2
from tests.service import small_model

pytestmark = pytest.mark.integration

STEPS = 12
COMMON = f"""
seed: 3
output: {{root}}/runs
duration: {STEPS} steps
evaluate_every: 6 steps
global_batch: 8
micro_batch: 2
workers: 2
device: cpu
precision: fp32
deterministic: true
log_samples: true
schedule: {{{{warmup: 3 steps, milestones: [8 steps, 10 steps]}}}}
checkpoint: {{{{every: 2 steps}}}}
tracking: {{{{uri: "sqlite:///{{root}}/mlflow.db", log_every: 3 steps, system_metrics: false}}}}
data: {{{{root: "{{root}}/scenes", short_sides: [64, 96], long_side: 128, loader: {{loader}}}}}}
"""
DETECT = f"{RETINANET}ema: {{decay: 0.9}}\n"
TIMED = ("time_s", "train/images_per_s", "val/images_per_s", "train/data_wait_share", "train/memory_bytes")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes, and a small classifier that is registered as models:/small@best with the run that it comes from."""
    folder = tmp_path_factory.mktemp("detect")
    uri = f"sqlite:///{folder}/mlflow.db"
    store.ensure_ready(uri)
    coco_export.export(folder / "scenes", coco_export.Scenes(train_count=20, val_count=7, size=96, classes=3, most=3))
    run = tracking.open_run(TrackingConfig(uri=uri, system_metrics=False), name="small", folder=folder / "small")
    run.finish()
    model = small_model.written(folder / "small" / "model")
    registry.register(model, name="small", run_id=run.run_id, metric="val/top1", tracking_uri=uri)
    (folder / "detect.yaml").write_text("job: detect\n" + COMMON.format(root=folder, loader="torch") + DETECT)
    (folder / "segment.yaml").write_text("job: segment\n" + COMMON.format(root=folder, loader="dali") + SOLOV2)
    return folder


def uri_of(root: Path) -> str:
    return f"sqlite:///{root}/mlflow.db"


def start(root: Path, job: str, *arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "service.cli", job, "--model", "models:/small@best"]
    line += ["--config", str(root / f"{job}.yaml"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(root: Path, job: str, *arguments: str, code: int = 0) -> str:
    process = start(root, job, *arguments)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == code, said
    return said


def tensors(root: Path, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    parts = sorted((root / "runs" / name / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    assert {part.stem for part in parts} >= {"optimizer", "weights"}
    return {f"{part.stem}/{key}": value for part in parts for key, value in load_file(part).items()}


def records(root: Path, name: str) -> list[dict[str, Any]]:
    lines = (root / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMED and "step_time" not in key}
        for line in lines
    ]


def samples(root: Path, name: str) -> dict[int, list[tuple[int, ...]]]:
    """The micro-batches of each step, of all workers, by the latest attempt at it."""
    attempts: dict[int, dict[str, list[tuple[int, ...]]]] = {}
    for path in (root / "runs" / name).glob("samples-rank*.jsonl"):
        for line in path.read_text().splitlines():
            told = json.loads(line)
            attempts.setdefault(told["step"], {}).setdefault(told["attempt"], []).extend(map(tuple, told["ids"]))
    return {step: sorted(found[max(found)]) for step, found in attempts.items()}


@contextlib.contextmanager
def moved_on(root: Path) -> Iterator[None]:
    """Meanwhile the alias is on a second version, of other weights, and the files of the first are gone."""
    api, uri = tracking.client(uri_of(root)), uri_of(root)
    files = registry.resolve("models:/small/1", uri).folder
    aside = files.rename(files.with_name("aside"))
    run = tracking.open_run(TrackingConfig(uri=uri, system_metrics=False), name="other", folder=root / "other")
    run.finish()
    version = registry.register(
        small_model.written(root / "other" / "model", seed=1),
        name="small",
        run_id=run.run_id,
        metric="val/top1",
        tracking_uri=uri,
    )
    api.set_registered_model_alias("small", "best", str(version))
    try:
        yield
    finally:
        aside.rename(files)
        api.set_registered_model_alias("small", "best", "1")
        api.delete_model_version("small", str(version))


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    said = finish(root, "detect")
    assert "box AP" in said
    assert "retinanet on resnet_small from models:/small/1" in said
    # Named after the model's version, not after an alias that moves on.
    return root / "runs" / "detect-small-1"


def await_step_4(root: Path, name: str, job: subprocess.Popen[str]) -> None:
    """Until the job has saved a checkpoint that is not its last, or is over."""
    there = root / "runs" / name / "checkpoints" / "step-00000004"
    await_(lambda: there.exists() or job.poll() is not None, "step 4", 240)


def test_a_run_whose_worker_is_killed_is_resumed_bit_identical_though_the_alias_has_moved_and_the_model_is_gone(
    root: Path, whole: Path
) -> None:
    # The job may end before a worker is killed, where this process has to wait for its turn.
    for number in range(5):
        name = f"killed-{number}"
        job = start(root, "detect", f"name={name}")
        await_step_4(root, name, job)
        started, found = family(job.pid), workers(job.pid)
        if 1 in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                found[1].kill()
        said, _ = job.communicate(timeout=500)
        psutil.wait_procs(started, timeout=120)
        assert job.returncode == 0 or 1 in found, said
        if job.returncode != 0:
            break
    assert job.returncode not in (0, None)
    with moved_on(root):
        # The same word stands for another model by now.
        assert registry.resolve("models:/small@best", uri_of(root)).version != 1
        said = finish(root, "detect", f"name={name}", "--resume")
    assert "of models:/small/1" in said
    expected, got = tensors(root, whole.name), tensors(root, name)
    assert got.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(got[key], value)] == []
    assert any(key.startswith("ema/") for key in got)
    assert records(root, name) == records(root, whole.name)
    assert samples(root, name) == samples(root, whole.name)


def test_one_worker_sees_the_same_micro_batches_and_comes_to_nearly_the_same_weights(root: Path, whole: Path) -> None:
    for name, count in (("alone", "1"), ("pair", "2")):
        short = ("duration=3 steps", "schedule.warmup=1 steps", "schedule.milestones=[2 steps]")
        finish(root, "detect", f"name={name}", *short, "--workers", count)
    assert samples(root, "alone") == samples(root, "pair")
    alone, pair = tensors(root, "alone", 3), tensors(root, "pair", 3)
    for name, value in alone.items():
        if name.startswith("weights/"):
            torch.testing.assert_close(pair[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_zero_1_trains_and_resumes_too(root: Path, whole: Path) -> None:
    short = ("zero_stage=1", "ema=null", "grace_s=120")
    # As above.
    for number in range(5):
        name = f"cut-{number}"
        job = start(root, "detect", f"name={name}", *short)
        await_step_4(root, name, job)
        job.terminate()
        said, _ = job.communicate(timeout=500)
        assert job.returncode in (0, 75), said
        if job.returncode == 75:
            break
    assert job.returncode == 75, said
    finish(root, "detect", f"name={name}", *short, "--resume")
    finish(root, "detect", "name=uncut", *short)
    expected, got = tensors(root, "uncut"), tensors(root, name)
    assert [key for key, value in expected.items() if not torch.equal(got[key], value)] == []


def test_the_result_lies_with_the_run_and_at_the_version_that_it_is_about(root: Path, whole: Path) -> None:
    result = json.loads((whole / "detect.json").read_text())
    assert (result["model"], result["version"], result["model_uri"]) == ("small", 1, "models:/small/1")
    assert 0 <= result["scores"]["AP"] <= result["scores"]["AP50"] <= 1
    api = tracking.client(uri_of(root))
    run = api.get_run(result["record_id"])
    assert run.info.status == "FINISHED"
    _, card, resolved = registry.load("models:/small@best", uri_of(root))
    assert run.data.tags["mlflow.parentRunId"] == resolved.run_id == result["run_id"]
    assert run.data.tags["model.uri"] == "models:/small/1"
    assert run.data.metrics["detect/AP"] == run.data.metrics["val/AP"] == result["scores"]["AP"]
    assert {file.path for file in api.list_artifacts(result["record_id"])} >= {"detect.json", "detector", "config.yaml"}
    (row,) = registry.list_models(uri_of(root))
    # No clock among them: measured again they are the same.
    assert {name.rstrip("0123456789sml") for name in result["scores"]} == {"AP", "AR"}
    tags = api.get_model_version("small", "1").tags
    # Of the latest run on it, which need not be this one.
    latest = api.get_run(tags["downstream.detect.run_id"]).data
    assert row.downstream["detect.AP"] == latest.metrics["detect/AP"]
    for key in ("data_digest", "config_digest"):
        assert tags[f"downstream.detect.{key}"] == latest.tags[key]
    assert latest.tags["data_digest"] == run.data.tags["data_digest"]
    assert tags["downstream.detect.seed"] == "3"
    assert bundle.read_card(whole / "backbone").weights_sha256 == card.weights_sha256


def test_the_detector_that_is_left_is_the_one_that_was_evaluated(root: Path, whole: Path) -> None:
    detector, card = detector_bundle.load(whole / "detector")
    average = {
        name.removeprefix("ema/module."): value
        for name, value in tensors(root, whole.name).items()
        if name.startswith("ema/module.")
    }
    assert all(torch.equal(value, average[name]) for name, value in detector.state_dict().items())
    assert (card.name, card.short_side, card.long_side, card.backbone["uri"]) == (
        "retinanet",
        96,
        128,
        "models:/small/1",
    )
    assert card.metrics["AP"] == json.loads((whole / "detect.json").read_text())["scores"]["AP"]


def test_the_very_same_job_is_found_again_and_another_one_is_not(root: Path, whole: Path) -> None:
    def look(*overrides: str) -> Any:
        model, path = "models:/small@best", root / "detect.yaml"
        return transfer.earlier(transfer.prepare("detect", model, path=path, overrides=overrides))

    found = look("name=whatever", "workers=1")
    assert found is not None
    assert found.run_id in {
        json.loads((folder / "detect.json").read_text())["record_id"]
        for folder in (whole, *(root / "runs").glob("killed-*"))
        if (folder / "detect.json").exists()
    }
    assert found.metrics["AP"] == json.loads((whole / "detect.json").read_text())["scores"]["AP"]
    assert look("seed=4") is None
    assert look("optimizer.lr=0.02") is None


def test_a_finished_run_is_evaluated_once_more_to_the_same_scores(root: Path, whole: Path) -> None:
    before = json.loads((whole / "detect.json").read_text())
    api = tracking.client(uri_of(root))
    recorded = api.get_metric_history(before["record_id"], "detect/AP")
    (whole / "detect.json").unlink()
    with moved_on(root):
        finish(root, "detect", f"name={whole.name}", "--eval-only")
    assert json.loads((whole / "detect.json").read_text()) == before
    again = api.get_metric_history(before["record_id"], "detect/AP")
    assert [one.value for one in again] == [before["scores"]["AP"]] * (len(recorded) + 1)
    assert "--eval-only evaluates a finished run again" in finish(root, "detect", "--eval-only", "name=absent", code=2)


def test_masks_are_trained_and_scored_by_the_same_job(root: Path) -> None:
    said = finish(root, "segment", "duration=4 steps", "schedule.milestones=[3 steps]", "evaluate_every=4 steps")
    assert "mask AP" in said
    result = json.loads((root / "runs" / "segment-small-1" / "segment.json").read_text())
    assert result["detector"] == "solov2"
    assert 0 <= result["scores"]["AP"] <= 1
    assert registry.list_models(uri_of(root))[0].downstream["segment.AP"] == result["scores"]["AP"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--model", "models:/small@bset"), 5, "aliases: best, latest; versions: 1"),
        (("--model", "models:/absent@best"), 5, "registered: small"),
        (("data.root=nowhere",), 3, "nowhere"),
        (("model.options.fpn_chanels=16",), 2, "fpn_channels"),
        (("optimizer.lr=1e30", "schedule.warmup=0 steps", "name=diverged"), 4, "not finite at step"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_work(
    root: Path, whole: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    assert told in finish(root, "detect", "name=refused", *arguments, code=code)
