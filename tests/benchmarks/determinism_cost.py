"""What deterministic mode costs a step: the same engine with it and without it, interleaved in one process.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.determinism_cost [--model resnet18 --size 64 --micro-batch 16]

`deterministic: true` makes torch use kernels that repeat bit for bit, or fail. On a CPU that changes few of them; on a
GPU it forbids the atomic additions and the search for the fastest convolution. Ratios are taken within a round.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from service import config
from service.training import distributed
from tests.benchmarks import steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="any of the service's networks")
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21, help="steps of each mode that are timed")
    given = parser.parse_args()
    world = distributed.connect("auto")
    job = config.resolve(
        {
            "global_batch": given.micro_batch * world.size,
            "micro_batch": given.micro_batch,
            "model": {"name": given.model},
            "output": str(Path(tempfile.gettempdir()) / "determinism_cost"),
        }
    )
    step, engine = steps.engine_step(job, steps.batch(given.micro_batch, given.size, world), world)

    def mode(deterministic: bool) -> Callable[[], None]:
        def run() -> None:
            torch.use_deterministic_algorithms(deterministic)
            step()

        return run

    times = steps.interleaved({"off": mode(False), "on": mode(True)}, given.rounds, world)
    if world.is_main:
        ratios = [on / off for on, off in zip(times["on"], times["off"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{given.model}, {given.size} px, micro-batch {given.micro_batch}, {world.device.type}")
        print(f"  a step without it: median {statistics.median(times['off']) * 1e3:.1f} ms")
        print(f"  deterministic / not: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")
    engine.close()
    distributed.disconnect()


if __name__ == "__main__":
    main()
    distributed.leave()
