"""Losses not finite on one of two workers, in whole jobs: both leave the update out, go back first, or stop."""

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest

from pipelines.order import Order, positions
from service import report
from tests.integration import small_job, stand_in_worker
from tests.integration.sample_logs import attempts, lines_of, newest_checkpoint
from tests.service.html_page import Page

pytestmark = pytest.mark.integration

STEPS = 12
WORKER = """
import sys
import torch
from service.training import classification, worker

def learn(config, engine, batch, meters, real=classification.learn):
    images = batch.images.clone()
    images[torch.isin(batch.ids, torch.tensor({bad}))] = torch.nan
    return real(config, engine, batch._replace(images=images), meters)

classification.learn = learn
sys.exit(worker.main())
"""


def given_to_rank_1(step: int) -> int:
    """A sample that the second worker is given at a step, and nobody gets again in the first epoch."""
    places = positions(step - 1, accumulation_index=0, rank=1, world_size=2, micro_batch=4, global_batch=16)
    return int(Order(seed=0, length=203).samples(places)[1][0])


# One before the first checkpoint and one behind it.
BAD = {step: given_to_rank_1(step) for step in (2, 7)}


def ran(root: Path, policy: str, *arguments: str, ends_with: int = 0) -> str:
    """Run the job to its end; what it said."""
    settings = (f"name={policy}", f"on_nonfinite={policy}", f"duration={STEPS} steps")
    worker = WORKER.format(bad=list(BAD.values()))
    job = stand_in_worker.start(root, worker, str(root / "job.yaml"), *settings, *arguments)
    said, _ = job.communicate(timeout=400)
    assert job.returncode == ends_with, said
    return said


def spoilt(folder: Path, step: int) -> list[int]:
    """The micro-batch of a step with its bad sample, by what the second worker wrote down."""
    given = [ids for line in lines_of(folder, 1) if line["step"] == step for ids in line["ids"]]
    (found,) = {tuple(ids) for ids in given if BAD[step] in ids}
    return list(found)


def left_out(root: Path, policy: str) -> str:
    """Run the job to its end, and look at what it left; what it said."""
    said = ran(root, policy)
    folder = root / "runs" / policy
    for step, sample in BAD.items():
        assert f"the loss is not finite at step {step}, in micro-batches of samples {sample}, " in said
        assert next(line["step"] for line in lines_of(folder, 1) if sample in chain(*line["ids"])) == step
    named(folder)
    return said


def named(folder: Path) -> None:
    """The summary and the report have each step with its samples."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["skipped_steps"] == list(BAD)
    samples = {step: spoilt(folder, step) for step in BAD}
    assert summary["nonfinite_steps"] == [
        {"step": step, "kind": "loss", "samples": ids, "num_samples": 4} for step, ids in samples.items()
    ]
    listed = [table[1:] for table in Page((folder / "report.html").read_text()).tables() if table[0][0] == "step"]
    assert listed == [[[str(step), "loss", ", ".join(map(str, ids))] for step, ids in samples.items()]]


def test_going_back_ends_where_skipping_does_and_only_one_of_two_workers_has_seen_why(tmp_path: Path) -> None:
    root = small_job.prepare(tmp_path)
    left_out(root, "skip")
    said = left_out(root, "rewind")
    small_job.same(root, "rewind", "skip", said, STEPS)
    # From the beginning, and from the checkpoint of step 4; skipping makes each step once.
    assert [(one.first, one.last) for one in attempts(root / "runs" / "skip")] == [(1, STEPS)]
    assert [(one.first, one.last) for one in attempts(root / "runs" / "rewind")] == [(1, 2), (1, 7), (5, STEPS)]
    # A run that goes on from behind both steps knows of them by its checkpoint alone.
    skipped = root / "runs" / "skip"
    shutil.rmtree(skipped / "checkpoints" / f"step-{STEPS:08d}")
    for name in ("summary.json", "report.html"):
        (skipped / name).unlink()
    assert max(BAD) < (behind := newest_checkpoint(skipped)) < STEPS
    assert f"going on from step {behind} of {STEPS}" in ran(root, "skip", "--resume")
    named(skipped)


def test_the_report_of_a_run_that_stopped_names_the_step_and_the_samples(tmp_path: Path) -> None:
    root = small_job.prepare(tmp_path)
    said = ran(root, "stop", ends_with=4)
    folder = root / "runs" / "stop"
    assert max(line["step"] for line in lines_of(folder, 0)) <= 3
    page = Page(report.write(folder, root / "report.html").read_text())
    (told,) = [text for text in page.texts if text.startswith("the loss is not finite at step 2, ")]
    assert f"in micro-batches of samples {', '.join(map(str, spoilt(folder, 2)))};" in told
    assert told in said
    # Begun anew, it comes to its end, and the report no longer speaks of the earlier one.
    ran(root, "stop", "on_nonfinite=skip", "--resume")
    named(folder)
    assert told not in Page((folder / "report.html").read_text()).texts
