"""`lorot compare` as a user starts it: two small models, all three jobs, interrupted, gone on with, and once more."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import datasets
from pipelines.drawing import coco_export
from service import bundle, models, registry, store, tracking
from service.bundle import Card
from service.config import ModelConfig, TrackingConfig
from tests.integration.processes import await_, family
from tests.integration.small_detectors import RETINANET, SOLOV2

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
DEMO = {"train_count": 6, "val_count": 8, "size": 48, "classes": 3}
COMMON = """
seed: 0
output: {root}/runs
duration: {steps} steps
evaluate_every: {steps} steps
global_batch: 4
micro_batch: 2
workers: 1
device: cpu
schedule: {{name: cosine, warmup: 1 steps}}
checkpoint: {{every: 2 steps}}
tracking: {{system_metrics: false}}
data: {{root: {root}/scenes, short_sides: [64], long_side: 96, loader: torch}}
"""
DETECT = f"job: detect\n{RETINANET}"
SEGMENT = f"job: segment\n{SOLOV2}"


def registered(root: Path, uri: str, pretext: str, seed: int) -> None:
    """A network as it was drawn, registered as if it had been trained on the drawn objects with this seed."""
    import torch

    torch.manual_seed(10 * seed + (pretext != "none"))
    kind = ModelConfig(name="resnet_small", width=8)
    classes = datasets.load("demo", root / "demo", "val", **DEMO).classes
    tracked = tracking.open_run(
        TrackingConfig(uri=uri, system_metrics=False), name=pretext, folder=root / f"{pretext}-{seed}"
    )
    tracked.log_params({"seed": seed, "duration": "1 steps"})
    tracked.finish()
    from pipelines.plan import View

    own = Card(
        model=kind.model_dump(mode="json"),
        classes=tuple(classes),
        view=bundle.evaluation_view(View(size=32)),
        data="demo",
        data_digest="d" * 64,
        data_options=DEMO,
        root=str(root / "demo"),
        split="val",
        pretext=pretext,
        objective="supervised" if pretext == "none" else "multi_task",
        metrics={"val/top1": 0.25 + 0.125 * seed},
    )
    folder = root / f"{pretext}-{seed}" / "model"
    bundle.write_bundle(folder, models.build(kind, 3, 0).state_dict(), own)
    registry.register(folder, name=pretext, run_id=tracked.run_id, metric="val/top1", tracking_uri=uri)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    uri = f"sqlite:///{folder}/mlflow.db"
    store.ensure_ready(uri)
    coco_export.export(folder / "scenes", coco_export.Scenes(train_count=8, val_count=4, size=96, classes=3, most=3))
    for pretext in ("none", "lorot_e"):
        registered(folder, uri, pretext, seed=0)
    (folder / "detect.yaml").write_text(COMMON.format(root=folder, steps=20) + DETECT)
    (folder / "segment.yaml").write_text(COMMON.format(root=folder, steps=2) + SEGMENT)
    return folder


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "service.cli", "compare", "models:/none@best", "models:/lorot_e@best"]
    line += [f"--config=detect={root}/detect.yaml", f"--config=segment={root}/segment.yaml"]
    line += [
        f"--output={root}/comparison",
        f"--tracking-uri=sqlite:///{root}/mlflow.db",
        "wsol.loader=torch",
        *arguments,
    ]
    environment = os.environ | ENVIRONMENT
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root
    )


def finish(root: Path, *arguments: str, code: int = 0) -> str:
    process = start(root, *arguments)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == code, said
    return said


def content(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "comparison" / "comparison.json").read_text())
    return found


def downstream_runs(root: Path) -> set[str]:
    api = tracking.client(f"sqlite:///{root}/mlflow.db")
    (experiment,) = [one for one in api.search_experiments() if one.name == "lorot"]
    runs = api.search_runs([experiment.experiment_id], "tags.job LIKE '%'")
    return {run.info.run_id for run in runs}


def test_interrupted_it_goes_on_where_it_was_and_the_next_time_nothing_runs(root: Path) -> None:
    told = finish(root, "--dry-run")
    assert "0 of 8 results are there, 8 to be measured" in told
    assert not (root / "comparison").exists()

    first = start(root)
    running = root / "runs"

    def in_a_detector() -> bool:
        assert first.poll() is None
        return any(running.glob("detect-*/checkpoints/step-00000002"))

    await_(in_a_detector, "a detector's checkpoint", 300)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=240)
    assert first.returncode == 75, said
    assert family(first.pid) == []
    assert "the same command goes on where it was" in said
    begun = {path.parents[1] for path in running.glob("detect-*/checkpoints/step-*")}
    # On a busy machine a detector may have come to its end before the signal.
    begun = {folder for folder in begun if not (folder / "summary.json").exists()}
    assert len(begun) <= 1
    before = content(root)
    there = len(before["results"])
    assert 4 <= there < 8
    assert [one["job"] for one in before["results"][:4]] == ["wsol"] * 4
    assert {one["exit_code"] for one in before["missing"]} == {75}
    kept = {one["run_id"] for one in before["results"]}

    said = finish(root)
    assert f"{there} results were there, {8 - there} were measured" in said
    # It went on with the run that was begun, from its checkpoint.
    for folder in begun:
        assert (folder / "summary.json").exists()
        log = "".join(path.read_text(errors="replace") for path in folder.glob("log-rank*.txt"))
        assert "going on from step" in said + log
    whole = content(root)
    assert whole["missing"] == []
    assert {one["run_id"] for one in whole["results"] if one["reused"]} == kept
    assert [one["name"] for one in whole["table"]["groups"]] == ["Baseline", "LoRot-E"]
    kinds = [block["kind"] for block in whole["table"]["blocks"]]
    assert kinds == ["classify", *["wsol", "wsol-cam", "wsol-iou"] * 2, "detect", "segment"]
    assert all(cell["published"] is None for b in whole["table"]["blocks"] for r in b["rows"] for cell in r["cells"])

    runs, csv = downstream_runs(root), (root / "comparison" / "comparison.csv").read_text()
    said = finish(root)
    assert "8 results were there, 0 were measured" in said
    assert downstream_runs(root) == runs
    assert (root / "comparison" / "comparison.csv").read_text() == csv
    again = content(root)
    assert again["table"] == whole["table"]
    assert all(one["reused"] for one in again["results"])
    assert [one["metrics"] for one in again["results"]] == [one["metrics"] for one in whole["results"]]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("models:/none@bset",), 5, "aliases: best, latest; versions: 1"),
        (("--jobs", "wsol,detct"), 2, "did you mean 'detect'"),
        (("--baseline", "none"), 2, "there are 'Baseline', 'LoRot-E'"),
        (("detect.optimizer.rate=1",), 2, "optimizer.rate"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    root: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    assert told in finish(root, *arguments, code=code)


def test_a_job_that_fails_leaves_the_others_alone_and_the_exit_code_says_so(root: Path) -> None:
    given = (f"--root=detect={root}/nowhere", "--jobs=wsol,detect", f"--output={root}/partly", "wsol.limit=5")
    line = start(root, *given)
    said, _ = line.communicate(timeout=300)
    assert line.returncode == 2, said  # --config=segment=... says something of a job that is not asked for
    arguments = [sys.executable, "-m", "service.cli", "compare", "models:/none@best", "models:/lorot_e@best", *given]
    arguments += [
        f"--config=detect={root}/detect.yaml",
        f"--tracking-uri=sqlite:///{root}/mlflow.db",
        "wsol.loader=torch",
    ]
    done = subprocess.run(
        arguments, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False, cwd=root
    )
    assert done.returncode == 3, done.stdout + done.stderr
    found = json.loads((root / "partly" / "comparison.json").read_text())
    assert [one["job"] for one in found["results"]] == ["wsol"] * 4
    assert ["nowhere" in one["reason"] for one in found["missing"]] == [True, True]
    assert "What is missing" in (root / "partly" / "comparison.html").read_text()
