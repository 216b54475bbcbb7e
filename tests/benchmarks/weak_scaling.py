"""Weak scaling from one worker to two, and what the averaging of gradients takes of a step; ratios from one run.

    python -m tests.benchmarks.weak_scaling [--model resnet18 --size 64 --micro-batch 16 --steps 12 --rounds 5]

Each worker has one thread and the same micro-batch. A round starts torchrun with one worker and with two, in turn, and
times their steps; efficiency is the first's time over the second's, 1 if the second worker were free. In the run of
two, steps with averaging alternate with steps that leave it out: the share is what the averaging adds to a step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service import config
from service.training import distributed
from tests.benchmarks import steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="any of the service's networks")
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("--micro-batch", type=int, default=16, help="images a worker and step")
    parser.add_argument("--steps", type=int, default=12, help="steps of each kind that a round times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", help="(of the processes that this starts)")
    given = parser.parse_args()
    if given.result:
        measure(given)
        return
    alone, pairs, shares = [], [], []
    for number in range(given.rounds):
        for workers in (1, 2) if number % 2 else (2, 1):
            found = launch(workers, given)
            (alone if workers == 1 else pairs).append(statistics.median(found["with"]))
            if workers == 2:
                shares += [1 - without / full for full, without in zip(found["with"], found["without"], strict=True)]
    efficiency = [one / two for one, two in zip(alone, pairs, strict=True)]
    print(f"{given.model}, {given.size} px, micro-batch {given.micro_batch}, one thread a worker")
    print(
        f"  step, 1 worker {statistics.median(alone) * 1e3:.1f} ms, 2 workers {statistics.median(pairs) * 1e3:.1f} ms"
    )
    spread = f"{min(efficiency):.3f} to {max(efficiency):.3f}"
    print(f"  weak scaling, 1 / 2: median {statistics.median(efficiency):.3f}, of rounds {spread}")
    low, middle, high = statistics.quantiles(shares, n=4)
    print(f"  averaging's share of a step of 2: median {middle:.1%}, quartiles {low:.1%} to {high:.1%}")


def launch(workers: int, given: argparse.Namespace) -> dict[str, list[float]]:
    """What `measure` found with so many workers: seconds of steps with averaging, and without."""
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "times.json"
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        line += ["-m", "tests.benchmarks.weak_scaling", "--result", str(result)]
        for name in ("model", "size", "micro_batch", "steps"):
            line += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(line, check=True, env=env, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
        times: dict[str, list[float]] = json.loads(result.read_text())
        return times


def measure(given: argparse.Namespace) -> None:
    """On every worker: time the steps; the main one leaves the result."""
    world = distributed.connect("auto")
    job = config.resolve(
        {
            "global_batch": given.micro_batch * world.size,
            "micro_batch": given.micro_batch,
            "model": {"name": given.model},
            "output": str(Path(given.result).parent),
        }
    )
    step, engine = steps.engine_step(job, steps.batch(given.micro_batch, given.size, world), world)
    averager: Any = engine._averager
    average = averager._average if averager is not None else None

    def kind(averages: bool) -> Callable[[], None]:
        def run() -> None:
            if averager is not None:
                averager._average = average if averages else lambda flat: None
            step()

        return run

    times = steps.interleaved({"with": kind(True), "without": kind(False)}, given.steps, world)
    if world.is_main:
        Path(given.result).write_text(json.dumps(times))
    engine.close()
    distributed.disconnect()


if __name__ == "__main__":
    main()
    distributed.leave()
