"""A job's whole step but its data, for benchmarks: the engine, the objective, the meters and what workers agree on."""

import time
from collections.abc import Callable

import torch

from pipelines.batch import Batch
from service import models
from service.config import JobConfig
from service.training import distributed, objectives
from service.training.distributed import World
from service.training.engine import Engine
from service.training.meters import Meters

CLASSES = 10


def batch(count: int, size: int, world: World) -> Batch:
    """Noise of (count, 3, size, size) on the worker's device, another on each."""
    generator = torch.Generator().manual_seed(world.rank)
    images = torch.randn(count, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    zeros = torch.zeros(count, dtype=torch.int64)
    boxes = torch.tensor([[0, 0, size]]).repeat(count, 1)
    valid = torch.ones(count, dtype=torch.bool)
    return Batch(images, labels, zeros, boxes, zeros, torch.arange(count), valid).to(world.device)


def engine_step(job: JobConfig, given: Batch, world: World) -> tuple[Callable[[], None], Engine]:
    """A step on the same micro-batch again and again, as the training loop makes it, and the engine that makes it."""
    torch.manual_seed(0)
    engine = Engine(job, models.build(job.model, CLASSES, 0), world)
    meters = Meters(CLASSES, objectives.loss_names("supervised"), device=world.device)

    def step() -> None:
        result = objectives.compute(engine, given, job.objective)
        engine.backward(result.losses["loss"])
        meters.update(result, given.labels, given.valid)
        engine.step(0.001)
        engine.agree(~torch.isfinite(result.losses["loss"].detach())[None]).tolist()

    return step, engine


def interleaved(loops: dict[str, Callable[[], None]], rounds: int, world: World) -> dict[str, list[float]]:
    """Seconds of each loop in each round, after two rounds to warm up; all workers begin and end together."""
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
