"""From the SIGKILL of a worker to the next optimizer step, on one machine.

    python -m tests.benchmarks.recovery_time [--kills 3] [--launcher torchrun|lorot]

Two workers train on drawn images with a checkpoint every few steps. A worker is killed, chosen in turn; the launcher
starts all of them again, which go on from the checkpoint. The parts: until the last of the old workers is gone, until
the new ones run, and until they have made a step. In seconds, which this machine's load decides more than the code:
beside them stands how long the first start took to its first step, in the same run.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

JOB = """
name: recovers
output: {root}/runs
duration: 1000000 steps
evaluate_every: 1000000 steps
global_batch: 32
micro_batch: 16
device: cpu
data: {{name: demo, root: {root}/demo, options: {{train_count: 400, val_count: 20, size: 64}}, size: 32}}
model: {{name: resnet_small, width: 16}}
optimizer: {{lr: 0.01}}
checkpoint: {{every: 20 steps}}
tracking: {{uri: "sqlite:///{root}/mlflow.db", log_every: 1 steps, system_metrics: false}}
registry: {{name: ""}}
"""
_PATIENCE_S = 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--launcher", choices=("torchrun", "lorot"), default="torchrun")
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="lorot-recovery-"))
    (root / "job.yaml").write_text(JOB.format(root=root))
    began = time.monotonic()
    job = start(root, given)
    try:
        await_that(job, lambda: last_step(root) >= 1)
        first = time.monotonic() - began
        laps = [kill(job, root, number) for number in range(given.kills)]
    except RuntimeError as error:
        sys.exit(f"{error}; the end of its log:\n{(root / 'log.txt').read_text()[-8000:]}")
    finally:
        end(job)
        shutil.rmtree(root)
    print(f"{given.launcher}, two workers, {given.kills} kills; from the first start to its first step {first:.1f} s")
    for part in laps[0]:
        values = [lap[part] for lap in laps]
        unit = "" if part.startswith("steps") else " s"
        print(f"  {part:34} median {statistics.median(values):6.1f}{unit}  ({min(values):.1f} to {max(values):.1f})")
    whole = statistics.median(lap["until the next step"] for lap in laps)
    print(f"  recovery / first start: {whole / first:.2f}")


def start(root: Path, given: argparse.Namespace) -> "subprocess.Popen[bytes]":
    """The job, under the launcher that is asked for."""
    restarts = ["--max-restarts", str(given.kills + 1)]
    if given.launcher == "lorot":
        line = [sys.executable, "-m", "service.cli", "train", str(root / "job.yaml"), "--workers", "2", *restarts]
    else:
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *restarts]
        line += ["-m", "service.training.worker", str(root / "job.yaml"), "--resume"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (root / "log.txt").open("w") as log:
        return subprocess.Popen(line, env=env, cwd=Path(__file__).parents[2], stdout=log, stderr=log)


def end(job: "subprocess.Popen[bytes]") -> None:
    """Kill the job, if it still runs, and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (*psutil.Process(job.pid).children(recursive=True), job):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    job.wait()


def kill(job: "subprocess.Popen[bytes]", root: Path, number: int) -> dict[str, float]:
    """Kill one worker and await the next step; returns the seconds to each part, and the steps to be made again."""
    checkpoints = root / "runs" / "recovers" / "checkpoints"
    await_that(job, lambda: any(checkpoints.glob("step-????????")))
    old = workers(job)
    reached = last_step(root)
    began = time.monotonic()
    os.kill(old[number % len(old)].pid, signal.SIGKILL)
    await_that(job, lambda: not any(process.is_running() and process.status() != "zombie" for process in old))
    ended = time.monotonic() - began
    lines = num_lines(root)
    await_that(job, lambda: len(workers(job)) == 2)
    running = time.monotonic() - began
    # The new ones first cut the record back to their checkpoint; then it grows.
    await_that(job, lambda: num_lines(root) != lines)
    resumed = last_step(root)
    stepped = time.monotonic() - began
    return {
        "until the old workers are gone": ended,
        "until new workers run": running,
        "until the next step": stepped,
        "steps to be made again": max(0, reached - resumed + 1),
    }


def await_that(job: "subprocess.Popen[bytes]", holds: Callable[[], bool]) -> None:
    """Wait until it holds; raises RuntimeError if the job ends or it takes too long."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):
            if holds():
                return
        if job.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the job ended or stands still; its launcher's exit code is {job.poll()}")
        time.sleep(0.02)


def workers(job: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The running workers, the oldest first."""
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = process.cmdline()
            if "service.training.worker" in line and "torch.distributed.run" not in line:
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def num_lines(root: Path) -> int:
    """Records so far."""
    return len(read(root))


def last_step(root: Path) -> int:
    """The step of the newest record; 0 without any."""
    lines = read(root)
    return int(json.loads(lines[-1])["step"]) if lines else 0


def read(root: Path) -> list[str]:
    """Whole lines of the record."""
    path = root / "runs" / "recovers" / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


if __name__ == "__main__":
    main()
