"""Losses that are not finite on one of two workers, in whole jobs: both leave the update out, or go back first."""

import json
from itertools import chain
from pathlib import Path

import pytest

from pipelines.order import Order, positions
from tests.integration import small_job, stand_in_worker
from tests.integration.sample_logs import attempts, lines_of

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


def left_out(root: Path, policy: str) -> str:
    """Run the job to its end; what it said."""
    arguments = (f"name={policy}", f"on_nonfinite={policy}", f"duration={STEPS} steps")
    worker = WORKER.format(bad=list(BAD.values()))
    job = stand_in_worker.start(root, worker, str(root / "job.yaml"), *arguments)
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 0, said
    folder = root / "runs" / policy
    assert json.loads((folder / "summary.json").read_text())["skipped_steps"] == list(BAD)
    for step, sample in BAD.items():
        assert f"the loss is not finite at step {step}, in micro-batches of samples {sample}, " in said
        assert next(line["step"] for line in lines_of(folder, 1) if sample in chain(*line["ids"])) == step
    return said


def test_going_back_ends_where_skipping_does_and_only_one_of_two_workers_has_seen_why(tmp_path: Path) -> None:
    root = small_job.prepare(tmp_path)
    left_out(root, "skip")
    said = left_out(root, "rewind")
    small_job.same(root, "rewind", "skip", said, STEPS)
    # From the beginning, and from the checkpoint of step 4; skipping makes each step once.
    assert [(one.first, one.last) for one in attempts(root / "runs" / "skip")] == [(1, STEPS)]
    assert [(one.first, one.last) for one in attempts(root / "runs" / "rewind")] == [(1, 2), (1, 7), (5, STEPS)]
