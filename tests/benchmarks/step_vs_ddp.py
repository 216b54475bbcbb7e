"""A training step through the engine against a bare DistributedDataParallel loop, in the same processes, interleaved.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/step_vs_ddp.py --model resnet50 --size 224

Both train the same network on the same batch with SGD-Nesterov. The engine's step holds all that a job's step does
but the data: the objective, the meters, averaged BatchNorm statistics and the check for a non-finite loss. The other
loop is what one would write by hand: torch's DDP and its default SGD.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from pipelines.batch import Batch
from service import config, models
from service.config import JobConfig
from service.training import distributed, objectives
from service.training.distributed import World
from service.training.engine import Engine
from service.training.meters import Meters

_CLASSES = 10


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
    batch = _batch(arguments.micro_batch, arguments.size, world)
    loops = {"ddp": _ddp(job, batch, world), "engine": _engine(job, batch, world)}
    times = _measure(loops, arguments.rounds, world)
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


def _batch(count: int, size: int, world: World) -> Batch:
    generator = torch.Generator().manual_seed(world.rank)
    images = torch.randn(count, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.randint(0, _CLASSES, (count,), generator=generator)
    zeros = torch.zeros(count, dtype=torch.int64)
    boxes = torch.tensor([[0, 0, size]]).repeat(count, 1)
    valid = torch.ones(count, dtype=torch.bool)
    return Batch(images, labels, zeros, boxes, zeros, torch.arange(count), valid).to(world.device)


def _ddp(job: JobConfig, batch: Batch, world: World) -> Callable[[], None]:
    torch.manual_seed(0)
    module = models.build(job.model, _CLASSES, 0).to(world.device, memory_format=torch.channels_last)
    model = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch.images).logits, batch.labels).backward()
        optimizer.step()

    return step


def _engine(job: JobConfig, batch: Batch, world: World) -> Callable[[], None]:
    torch.manual_seed(0)
    engine = Engine(job, models.build(job.model, _CLASSES, 0), world)
    meters = Meters(_CLASSES, objectives.loss_names("supervised"), device=world.device)

    def step() -> None:
        result = objectives.compute(engine, batch, job.objective)
        engine.backward(result.losses["loss"])
        meters.update(result, batch.labels, batch.valid)
        engine.step(0.001)
        engine.agree(~torch.isfinite(result.losses["loss"].detach())[None]).tolist()

    return step


def _measure(loops: dict[str, Callable[[], None]], rounds: int, world: World) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in loops}
    for index in range(rounds + 2):
        # Whoever goes second finds colder caches: they take turns.
        for name in list(loops)[:: 1 if index % 2 else -1]:
            distributed.barrier()
            began = time.perf_counter()
            loops[name]()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            distributed.barrier()
            if index >= 2:
                times[name].append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main()
