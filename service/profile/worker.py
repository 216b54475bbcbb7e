"""What torchrun starts on every worker to profile a job: `... -m service.profile.worker CONFIG [...] [--steps N]`."""

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from typing import IO

import torch

from pipelines import loading, pretext
from pipelines.batch import Batch
from service import machine, models
from service.config import JobConfig, TrainingConfig
from service.profile.findings import RESULT, Findings, Setting
from service.profile.measuring import Training
from service.run_folder import RunFolder
from service.training import distributed, entrance, feeding, objectives
from service.training.distributed import World
from service.training.ema import Ema
from service.training.engine import Engine
from service.training.engine_settings import autocast_dtype
from service.training.meters import Meters
from service.training.watchdog import Watchdog

# So small that no weight moves and no loss can overflow; a step costs the same at any rate.
_RATE = 1e-12
_ENDLESS = 10**6


def main(arguments: list[str] | None = None) -> int:
    """Run one worker to its end, and end the process; returns the exit code only of one that cannot begin."""
    parser = argparse.ArgumentParser(prog="service.profile.worker", description=__doc__)
    parser.add_argument("config", help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values on top of it")
    parser.add_argument("--steps", type=int, help="optimizer steps of each phase; default: what fits into 20 s")
    given = parser.parse_args(arguments)

    def profile(job: TrainingConfig, folder: RunFolder, _: IO[str] | None) -> None:
        # The command has refused any other.
        assert isinstance(job, JobConfig)
        if os.environ.get("RANK", "0") == "0":
            entrance.forget_earlier(folder)
        found = work(job, folder, given.steps)
        if found is not None:
            folder.write(RESULT, dataclasses.asdict(found))

    return entrance.enter(given.config, given.overrides, profile)


def work(job: JobConfig, folder: RunFolder, steps: int | None) -> Findings | None:
    """Measure the job's parts with the other workers; the main one has the findings."""
    job = job.model_copy(update={"optimizer": job.optimizer.model_copy(update={"lr": _RATE})})
    world = distributed.connect(job.device, job.timeout_s)
    with Watchdog(folder, world, job.timeout_s) as watchdog:
        found = _measure(job, world, steps, watchdog)
    distributed.disconnect()
    return found if world.is_main else None


def _measure(job: JobConfig, world: World, steps: int | None, watchdog: Watchdog) -> Findings:
    train_set, _ = feeding.open_splits(job, world)
    task = pretext.load(job.pretext.name, **job.pretext.options)
    num_pretext = task.num_labels if objectives.learns_pretext(job.objective.name) else 0
    torch.manual_seed(job.seed)
    model = models.build(job.model, len(train_set.classes), num_pretext)
    ema = Ema(model.to(world.device), job.ema.decay, job.ema.every) if job.ema is not None else None
    engine = Engine(job, model, world)
    names = objectives.loss_names(job.objective.name)
    meters = Meters(len(train_set.classes), names, device=world.device, rank=world.rank, world_size=world.size)
    training = Training(job, engine, ema, meters, len(train_set))

    source = at_largest(feeding.train_source(job, train_set, task))

    def opened() -> loading.Loader:
        return loading.open_train(
            job.data.loader,
            source,
            start_step=0,
            stop_step=_ENDLESS,
            global_batch=job.global_batch,
            micro_batch=job.micro_batch,
            **feeding.loader_options(job, world),
        )

    def watched(batches: Iterator[Batch], what: str) -> Iterator[Batch]:
        return watchdog.through(batches, "waiting for a batch", what)

    with opened() as batches:
        loader, kept = training.load(batches, watched(batches, "measuring the loader"), steps)
    again = watched(itertools.cycle(kept), "measuring the step")
    count = steps or training.num_steps(again)
    if steps:
        training.run(again, 1)
    step = training.run(again, count)
    with opened() as batches:
        new = watched(batches, "measuring both")
        training.run(new, 1)
        both = training.run(new, count)
    engine.close()
    pixels = train_set.heights.astype(float) * train_set.widths
    dtype = autocast_dtype(job, world.device)
    setting = Setting(
        device=world.device.type,
        cores=machine.cores(),
        workers=world.size,
        num_threads=feeding.num_threads(job, world.local_size),
        prefetch=job.data.prefetch,
        accumulation=engine.accumulation,
        precision="fp32" if dtype is None else {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype],
        compiled=job.compile,
        loader=job.data.loader,
        encoded=train_set.encoded,
        source_pixels=float(pixels.mean()),
        size=source.view.size,
    )
    return Findings(setting, loader, step, both)


def at_largest(source: loading.Source) -> loading.Source:
    """The same, all of it at the largest of its sizes: the one that loading, the step and prepared data must bear."""
    view = dataclasses.replace(source.view, size=source.all_sizes[-1])
    return dataclasses.replace(source, view=view, sizes=())


if __name__ == "__main__":
    sys.exit(main())
