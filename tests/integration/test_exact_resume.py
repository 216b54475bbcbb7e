"""Runs that are killed at random moments, any worker or a launcher: they end as if nothing had been.

LOROT_ROUNDS says how many rounds (default 4), LOROT_SEED which kills: the seed of a failure is in its message.
"""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.integration.processes import await_, family, workers
from tests.integration.sample_logs import lines_of
from tests.integration.small_job import LOG_EVERY, STEPS, finish, prepare, records, same, samples, start
from tests.soak.checks import tracked

pytestmark = pytest.mark.integration

ROUNDS = int(os.environ.get("LOROT_ROUNDS", "4"))
SEED = int(os.environ.get("LOROT_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("exact"))


def of_stage(zero_stage: int) -> list[str]:
    """Overrides for a stage of ZeRO. The third cuts the weights that an average would copy."""
    return [f"zero_stage={zero_stage}", *(["ema=null"] if zero_stage == 3 else [])]


def uninterrupted(root: Path, zero_stage: int) -> str:
    """The run that nothing disturbed, made when it is first needed."""
    name = f"whole-zero{zero_stage}"
    if not (root / "runs" / name / "summary.json").exists():
        finish(root, name, *of_stage(zero_stage))
    return name


# When the first two attempts of a round are disturbed, by turns.
MOMENTS = (("training", "the end"), ("the start", "training"), ("training", "training"))


def killed_until_done(root: Path, name: str, dice: random.Random, moments: Sequence[str], *overrides: str) -> list[str]:
    """Start, kill something at some moment, start again, ...; the attempts after the last moment are left alone."""
    story: list[str] = []
    for attempt in range(20):
        job = start(root, name, *overrides, *(["--resume"] if attempt else []))
        if attempt < len(moments):
            when = until(moments[attempt], job, root / "runs" / name, dice)
            processes, ranks = family(job.pid), workers(job.pid)
            there = {"launcher": processes[:1], "torchrun": processes[1:2], "all": processes}
            there |= {f"worker {rank}": [process] for rank, process in ranks.items()}
            # A machine may be so quick that the job is over by now.
            chosen = dice.choice(sorted(name for name, members in there.items() if members) or ["nobody"])
            for victim in there.get(chosen, []):
                kill(victim)
            job.communicate(timeout=240)
            story.append(f"{chosen} {when}: exit code {job.returncode}")
            # Whoever starts it again may be quicker than what is left of it.
            psutil.wait_procs(processes, timeout=60)
            continue
        said, _ = job.communicate(timeout=400)
        if job.returncode == 0:
            return story
        story.append(f"exit code {job.returncode}: {said[-2000:]}")
    raise AssertionError(f"it never came to an end: {story}")


def until(moment: str, job: "subprocess.Popen[str]", folder: Path, dice: random.Random) -> str:
    """Wait for a moment of a job's life, unless it ends before; which it was."""
    log, begun = folder / "log-rank1.txt", len(lines_of(folder, 0))
    written = log.stat().st_size if log.exists() else 0
    # Behind the first checkpoint, at step 4: a job that begins anew shows nothing of what it goes on from.
    steps = dice.randrange(6, (STEPS - 6) // 2)
    longest_s, is_there = {
        # Imports, the process group, the data, the checkpoint, the first step.
        "the start": (4.0, lambda: log.exists() and log.stat().st_size > written),
        "training": (0.4, lambda: len(lines_of(folder, 0)) - begun >= steps),
        # The last evaluation, the last checkpoint, registration.
        "the end": (1.0, lambda: [line["step"] for line in lines_of(folder, 0)[begun:]][-1:] == [STEPS]),
    }[moment]
    await_(lambda: is_there() or job.poll() is not None, moment, 200)
    wait_s = dice.uniform(0.0, longest_s)
    time.sleep(wait_s)
    return f"{wait_s:.2f} s after {f'{steps} steps' if moment == 'training' else moment}"


def kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_run_killed_at_random_moments_ends_bit_identical(root: Path, number: int) -> None:
    dice = random.Random(SEED + number)
    name = f"killed-{number}"
    # By turns, since the state lies in pieces of other kinds.
    zero_stage = number % 4
    overrides = (*of_stage(zero_stage), f"registry.name={name}")
    story = killed_until_done(root, name, dice, MOMENTS[number % len(MOMENTS)], *overrides)
    context = f"LOROT_SEED={SEED}, round {number}, ZeRO {zero_stage}: {story}"
    print(context)
    assert any("exit code 0" not in told for told in story), f"nothing was lost: {context}"
    same(root, name, uninterrupted(root, zero_stage), context)
    # One finished run with each record once, and one version of the model.
    assert tracked(f"sqlite:///{root}/mlflow.db", STEPS, root / "runs" / name, LOG_EVERY) == [], context


def stopped_after(root: Path, name: str, step: int, *arguments: str) -> tuple[int, str]:
    """Start a job and stop it when its checkpoint of a step is there; its exit code, and what it said."""
    job = start(root, name, "grace_s=120", *arguments)
    saved = root / "runs" / name / "checkpoints" / f"step-{step:08d}"
    await_(lambda: saved.exists() or job.poll() is not None, f"step {step}", 240)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=300)
    return job.returncode, said


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_resumed_on_fewer_and_on_more_workers_it_sees_the_same_samples_and_the_losses_agree(
    root: Path, zero_stage: int
) -> None:
    """From two workers to one, and on to two."""
    stage = of_stage(zero_stage)
    # The job may end before the signal comes, where this process has to wait for its turn.
    for number in range(5):
        name = f"resized-zero{zero_stage}-{number}"
        ends = [stopped_after(root, name, 12, *stage)]
        if ends[-1][0] == 75:
            ends.append(stopped_after(root, name, 24, *stage, "--workers", "1", "--resume"))
        assert all(code in (0, 75) for code, _ in ends), ends
        if [code for code, _ in ends] == [75, 75]:
            break
    assert [code for code, _ in ends] == [75, 75], ends
    finish(root, name, *stage, "--resume")
    folder, whole = root / "runs" / name, uninterrupted(root, zero_stage)
    assert samples(root, name) == samples(root, whole)
    seen = Counter(sample for step in range(1, 13) for part in samples(root, name)[step] for sample in part)
    assert max(seen.values()) == 1, "12 steps of 16 lie within the first epoch of 203"
    shrunk, grown = (int(said.split("stopped after step ")[1].split(";")[0]) for _, said in ends)
    # Rank 1 took part in the first and the last stretch alone.
    assert [line["step"] for line in lines_of(folder, 1)] == [*range(1, shrunk + 1), *range(grown + 1, STEPS + 1)]
    for expected, got in zip(records(root, whole), records(root, name), strict=True):
        assert got["step"] == expected["step"]
        if "train/loss" in got:
            assert got["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-3 if got["step"] > shrunk else 0)
            assert got["train/lr"] == expected["train/lr"]
