"""Runs that are killed at random moments, any worker or a launcher: they end as if nothing had been.

LOROT_ROUNDS says how many rounds (default 3), LOROT_SEED which kills: the seed of a failure is in its message.
"""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from tests.integration.processes import await_, family, workers
from tests.integration.small_job import STEPS, finish, prepare, records, samples, start, tensors

pytestmark = pytest.mark.integration

ROUNDS = int(os.environ.get("LOROT_ROUNDS", "3"))
SEED = int(os.environ.get("LOROT_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("exact"))


def same(root: Path, name: str, whole: str, context: str) -> None:
    expected, got = tensors(root, whole), tensors(root, name)
    assert got.keys() == expected.keys(), context
    for key, value in expected.items():
        assert torch.equal(got[key], value), f"{key}; {context}"
    assert records(root, name) == records(root, whole), context
    assert samples(root, name) == samples(root, whole), context


@pytest.fixture(scope="module")
def whole(root: Path) -> str:
    finish(root, "whole")
    return "whole"


def killed_until_done(root: Path, name: str, dice: random.Random, *overrides: str) -> list[str]:
    """Start, kill something at some moment, start again, ...; the third or a later attempt is left alone."""
    story: list[str] = []
    folder = root / "runs" / name
    for attempt in range(20):
        job = start(root, name, *overrides, *(["--resume"] if attempt else []))
        if attempt < 2:
            # Not before it trains, mostly: of a start there is little to lose.
            steps, wait_s = dice.randrange(1, STEPS - 6), dice.uniform(0.0, 0.4)
            log = folder / "samples-rank0.jsonl"
            before = log.read_text().count("\n") if log.exists() else 0
            deadline = time.monotonic() + 240
            while job.poll() is None and time.monotonic() < deadline:
                if log.exists() and log.read_text().count("\n") - before >= max(1, steps // 2):
                    break
                time.sleep(0.02)
            time.sleep(wait_s)
            processes, ranks = family(job.pid), workers(job.pid)
            chosen = dice.choice(["worker 0", "worker 1", "launcher", "torchrun", "all"])
            victims = {
                "launcher": processes[:1],
                "torchrun": processes[1:2],
                "worker 0": [ranks[0]] if 0 in ranks else [],
                "worker 1": [ranks[1]] if 1 in ranks else [],
                "all": processes,
            }[chosen]
            story.append(f"{chosen} after {steps // 2} steps and {wait_s:.2f} s")
            for victim in victims:
                kill(victim)
            job.communicate(timeout=240)
            # Whoever starts it again may be quicker than what is left of it.
            psutil.wait_procs(processes, timeout=60)
            continue
        said, _ = job.communicate(timeout=400)
        if job.returncode == 0:
            return story
        story.append(f"exit code {job.returncode}: {said[-2000:]}")
    raise AssertionError(f"it never came to an end: {story}")


def kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_run_killed_at_random_moments_ends_bit_identical(root: Path, whole: str, number: int) -> None:
    dice = random.Random(SEED + number)
    name = f"killed-{number}"
    # By turns, since the state of ZeRO 1 lies in pieces.
    story = killed_until_done(root, name, dice, f"zero_stage={number % 2}")
    same(root, name, whole if number % 2 == 0 else partitioned(root), f"LOROT_SEED={SEED}, round {number}: {story}")


def partitioned(root: Path) -> str:
    """The uninterrupted run with ZeRO 1, made when it is first needed."""
    if not (root / "runs" / "whole-zero1" / "summary.json").exists():
        finish(root, "whole-zero1", "zero_stage=1")
    return "whole-zero1"


def stopped_at_12(root: Path, name: str) -> tuple[int, str]:
    """Start a job and stop it when its checkpoint of step 12 is there; its exit code, and what it said."""
    job = start(root, name, "grace_s=120")
    twelfth = root / "runs" / name / "checkpoints" / "step-00000012"
    await_(lambda: twelfth.exists() or job.poll() is not None, "step 12", 240)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=300)
    return job.returncode, said


def test_resumed_on_another_number_of_workers_it_sees_the_same_samples_and_the_losses_agree(
    root: Path, whole: str
) -> None:
    # The job may end before the signal comes, where this process has to wait for its turn.
    for number in range(5):
        name = f"shrunk-{number}"
        code, said = stopped_at_12(root, name)
        assert code in (0, 75), said
        if code == 75:
            break
    assert code == 75, said
    finish(root, name, "--workers", "1", "--resume")
    assert samples(root, name) == samples(root, whole)
    seen = Counter(sample for step in range(1, 13) for part in samples(root, name)[step] for sample in part)
    assert max(seen.values()) == 1, "12 steps of 16 lie within the first epoch of 203"
    stopped = int(said.split("stopped after step ")[1].split(";")[0])
    for expected, got in zip(records(root, whole), records(root, name), strict=True):
        assert got["step"] == expected["step"]
        if got["step"] > stopped and "train/loss" in got:
            assert got["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-3)
