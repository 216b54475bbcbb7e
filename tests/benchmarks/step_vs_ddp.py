"""A training step through the engine against a bare DistributedDataParallel loop, in the same processes, interleaved.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/step_vs_ddp.py --model resnet50 --size 224

Both train the same network on the same batch with SGD-Nesterov. The engine's step holds all that a job's step does
but the data: the objective, the meters, averaged BatchNorm statistics and the check for a non-finite loss. The other
loop is what one would write by hand: torch's DDP and its default SGD.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from pipelines.batch import Batch
from service import config, models
from service.config import JobConfig
from service.training import distributed
from service.training.distributed import World
from tests.benchmarks import steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="any of the service's networks")
    parser.add_argument("--width", type=int, default=32, help="of resnet_small")
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("--micro-batch", type=int, default=16, help="images a worker and step")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each loop that are timed")
    parser.add_argument("--zero", type=int, default=0, help="the engine's ZeRO stage")
    arguments = parser.parse_args()
    world = distributed.connect("auto")
    job = config.resolve(
        {
            "global_batch": arguments.micro_batch * world.size,
            "micro_batch": arguments.micro_batch,
            "zero_stage": arguments.zero,
            "precision": "fp32",
            "model": {"name": arguments.model, "width": arguments.width},
            "optimizer": {"lr": 0.001},
            "output": str(Path(tempfile.gettempdir()) / "step_vs_ddp"),
        }
    )
    batch = steps.batch(arguments.micro_batch, arguments.size, world)
    loops = {"ddp": _ddp(job, batch, world), "engine": steps.engine_step(job, batch, world)[0]}
    times = steps.interleaved(loops, arguments.rounds, world)
    if world.is_main:
        print(f"{arguments.model}, {arguments.size} px, micro-batch {arguments.micro_batch}, {world.size} workers")
        for name, seconds in times.items():
            print(
                f"  {name:7s} median {statistics.median(seconds) * 1e3:8.1f} ms, shortest {min(seconds) * 1e3:8.1f} ms"
            )
        pairs = [ours / theirs for ours, theirs in zip(times["engine"], times["ddp"], strict=True)]
        ratio = statistics.median(times["engine"]) / statistics.median(times["ddp"])
        shortest = min(times["engine"]) / min(times["ddp"])
        print(f"  engine / ddp: medians {ratio:.3f}, of pairs {statistics.median(pairs):.3f}, shortest {shortest:.3f}")
    distributed.barrier()
    distributed.disconnect()


def _ddp(job: JobConfig, batch: Batch, world: World) -> Callable[[], None]:
    torch.manual_seed(0)
    module = models.build(job.model, steps.CLASSES, 0).to(world.device, memory_format=torch.channels_last)
    model = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch.images).logits, batch.labels).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
    distributed.leave()
