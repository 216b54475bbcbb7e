"""The training loop. It knows no method, data set, tracker or launcher by name."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from service.config import TrainingConfig
from service.errors import JobError, stop_code
from service.training import distributed, task
from service.training.ema import Ema
from service.training.engine import Engine
from service.training.lengths import Lengths
from service.training.meters import Meters
from service.training.schedule import learning_rate
from service.training.task import Samples
from service.training.watch import Watch, Wishes


class Keeper(Protocol):
    """What the loop asks of whoever keeps records and checkpoints; all workers call all of it."""

    def step(self, step: int) -> None: ...

    def record(self, metrics: Mapping[str, float], step: int) -> None: ...

    def is_best(self, metrics: Mapping[str, float]) -> bool: ...

    def save(self, step: int, metrics: Mapping[str, float], *, wait: bool = False) -> None: ...

    def last_saved(self) -> str: ...


def train(
    config: TrainingConfig,
    lengths: Lengths,
    engine: Engine,
    ema: Ema | None,
    batches: Iterator[Samples],
    meters: Meters,
    evaluate: Callable[[], Mapping[str, float] | None],
    keeper: Keeper,
    watch: Watch,
    first_step: int = 0,
) -> dict[str, float]:
    """Run optimizer steps `first_step` to the last; returns the last evaluation's metrics.

    Args:
        evaluate: None if a signal made it give up; `watch` says which.

    Raises:
        NonFiniteLossError: on every worker, naming the step, the samples and the last good checkpoint.
        Rewind: on every worker, to be called again from the last checkpoint.
        JobError: on every worker, after saving, when a signal asked any of them to stop.
        StorageError: on every worker, when a checkpoint cannot be written.
    """
    metrics: dict[str, float] = {}
    learn = task.learning(config)

    def conclude(done: int, asked: Wishes, resumed: bool = False) -> None:
        """Evaluate and save what is due after `done` steps, and stop if that was asked for."""
        evaluated: dict[str, float] = {}
        stop = asked.stop
        if watch.owes_evaluation and not stop:
            found = evaluate()
            engine.train()
            stop = watch.settle()
            if found is not None:
                metrics.clear()
                metrics.update(found)
                evaluated = metrics.copy()
                watch.owes_evaluation = False
                keeper.record(evaluated, done)
        scheduled = done == lengths.total or (lengths.save > 0 and done % lengths.save == 0)
        if scheduled or resumed or asked.save or stop or keeper.is_best(evaluated):
            watch.agree(done, flush=True)
            keeper.save(done, evaluated, wait=bool(stop) or done == lengths.total)
        if stop and (done < lengths.total or watch.owes_evaluation):
            raise JobError(f"stopped after step {done}; {keeper.last_saved()} is saved", stop_code(stop))

    engine.train()
    if watch.owes_evaluation:
        conclude(first_step, Wishes(0, False), resumed=True)
    for step in range(first_step, lengths.total):
        done = step + 1
        records = done % lengths.record == 0 or done == lengths.total
        began, waited_s = time.perf_counter(), 0.0
        left_out = watch.leaves_out(done)
        if watch.skips:
            engine.keep_buffers()
            meters.keep()
        for _ in range(engine.accumulation):
            asked_at = time.perf_counter()
            batch = next(batches)
            waited_s += time.perf_counter() - asked_at
            if left_out:
                continue
            loss = learn(config, engine, batch, meters)
            engine.backward(loss)
            watch.note(loss, batch.ids)
        rate = learning_rate(
            config.schedule, config.optimizer.lr, step, lengths.total, lengths.samples, config.global_batch
        )
        gradient_norm = math.nan
        if not left_out:
            gradient_norm = engine.step(rate, measure=records, spoilt=watch.spoilt() if watch.skips else None)
            if engine.dropped:
                meters.put_back()
                gradient_norm = math.nan
        watch.owes_evaluation = done % lengths.evaluate == 0 or done == lengths.total
        # Before the average takes them in: from here on all workers have the same BatchNorm statistics.
        asked = watch.agree(done, flush=records or watch.owes_evaluation)
        if ema is not None and not left_out and not engine.dropped:
            ema.update(engine.module, done)
        meters.record_step(time.perf_counter() - began, waited_s)
        keeper.step(done)
        if records:
            summary = meters.collect(distributed.all_sum, memory_bytes(engine.world.device)).metrics
            epoch = done * config.global_batch / lengths.samples
            state = {"lr": rate, "epoch": epoch}
            if math.isfinite(gradient_norm):
                state["grad_norm"] = gradient_norm
            if watch.counts:
                state["skipped_steps"] = watch.num_left_out(done)
            keeper.record({f"train/{name}": value for name, value in (summary | state).items()}, done)
        conclude(done, asked)
    return metrics


def memory_bytes(device: torch.device) -> float:
    """The most memory this worker has used: of its GPU, or of the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
