"""The training loop. It knows no method, data set, tracker or launcher by name."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipelines.batch import Batch
from service.config import JobConfig
from service.errors import JobError, NonFiniteLossError
from service.training import distributed, objectives
from service.training.ema import Ema
from service.training.engine import Engine
from service.training.lengths import Lengths
from service.training.meters import Meters
from service.training.schedule import learning_rate


class Keeper(Protocol):
    """What the loop asks of whoever keeps records and checkpoints; all workers call all of it."""

    def step(self, step: int) -> None: ...

    def record(self, metrics: Mapping[str, float], step: int) -> None: ...

    def save_is_due(self) -> bool: ...

    def is_best(self, metrics: Mapping[str, float]) -> bool: ...

    def save(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def last_saved(self) -> str: ...

    def stop_signal(self) -> int: ...


def train(
    config: JobConfig,
    lengths: Lengths,
    engine: Engine,
    ema: Ema | None,
    batches: Iterator[Batch],
    meters: Meters,
    evaluate: Callable[[], Mapping[str, float]],
    keeper: Keeper,
    first_step: int = 0,
) -> dict[str, float]:
    """Run optimizer steps `first_step` to the last; returns the last evaluation's metrics.

    Raises:
        NonFiniteLossError: on every worker, naming the step, the samples and the last good checkpoint.
        JobError: on every worker, after saving, when a signal asked any of them to stop.
    """
    watch = Watch(engine, keeper)
    engine.train()
    metrics: dict[str, float] = {}
    for step in range(first_step, lengths.total):
        done = step + 1
        records = done % lengths.record == 0 or done == lengths.total
        began, waited_s = time.perf_counter(), 0.0
        for _ in range(engine.accumulation):
            asked = time.perf_counter()
            batch = next(batches)
            waited_s += time.perf_counter() - asked
            result = objectives.compute(engine, batch, config.objective)
            engine.backward(result.losses["loss"])
            meters.update(result, batch.labels, batch.valid)
            watch.note(result.losses["loss"], batch.ids)
        rate = learning_rate(
            config.schedule, config.optimizer.lr, step, lengths.total, lengths.samples, config.global_batch
        )
        gradient_norm = engine.step(rate, measure=records)
        evaluates = done % lengths.evaluate == 0 or done == lengths.total
        # Before the average takes them in: from here on all workers have the same BatchNorm statistics.
        asked_to = watch.agree(done, flush=records or evaluates)
        if ema is not None:
            ema.update(engine.module, done)
        meters.record_step(time.perf_counter() - began, waited_s)
        keeper.step(done)
        if records:
            summary = meters.collect(distributed.all_sum, memory_bytes(engine.world.device)).metrics
            epoch = done * config.global_batch / lengths.samples
            state = {"lr": rate, "grad_norm": gradient_norm, "epoch": epoch}
            keeper.record({f"train/{name}": value for name, value in (summary | state).items()}, done)
        evaluated: dict[str, float] = {}
        if evaluates:
            evaluated = metrics = dict(evaluate())
            engine.train()
            keeper.record(evaluated, done)
        scheduled = done == lengths.total or (lengths.save > 0 and done % lengths.save == 0)
        if scheduled or asked_to.save or asked_to.stop or keeper.is_best(evaluated):
            watch.agree(done, flush=True)
            keeper.save(done, evaluated)
        if asked_to.stop and done < lengths.total:
            raise JobError(f"stopped after step {done}; {keeper.last_saved()} is saved", 128 + asked_to.stop)
    return metrics


@dataclass(frozen=True)
class Wishes:
    """What any worker asked for at this step: the number of a signal to stop for, or 0; a checkpoint."""

    stop: int
    save: bool


class Watch:
    """Lets all workers agree, once a step, on what only one may have seen: a loss not finite, a signal, a clock.

    Reading the answer makes the host wait for a GPU, so there it is read a step later, when it has long been there.
    """

    def __init__(self, engine: Engine, keeper: Keeper) -> None:
        self._engine = engine
        self._keeper = keeper
        self._lags = engine.world.device.type == "cuda"
        self._losses: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._waiting: list[tuple[int, Tensor, list[Tensor], list[Tensor]]] = []
        self._stop = 0

    def note(self, loss: Tensor, ids: Tensor) -> None:
        """A micro-batch's loss and its samples."""
        self._losses.append(loss.detach())
        self._ids.append(ids)

    def agree(self, step: int, flush: bool = False) -> Wishes:
        """What the workers ask for; raises NonFiniteLossError on all of them. `flush` leaves no answer for later."""
        if self._losses:
            bad = (~torch.isfinite(torch.stack(self._losses))).any().float()
            signal = self._keeper.stop_signal()
            mine = [float(signal == 2), float(signal not in (0, 2)), float(self._keeper.save_is_due())]
            votes = self._engine.agree(torch.cat([bad[None], torch.tensor(mine, device=bad.device)]))
            self._waiting.append((step, votes, self._losses, self._ids))
            self._losses, self._ids = [], []
        keep = 0 if flush or not self._lags else 1
        save = False
        while len(self._waiting) > keep:
            save |= self._read(*self._waiting.pop(0))
        return Wishes(self._stop, save)

    def _read(self, step: int, votes: Tensor, losses: list[Tensor], ids: list[Tensor]) -> bool:
        bad, interrupted, terminated, save = votes.tolist()
        if bad:
            self._complain(step, losses, ids)
        self._stop = 2 if interrupted else 15 if terminated else self._stop
        return bool(save)

    def _complain(self, step: int, losses: list[Tensor], ids: list[Tensor]) -> None:
        """Name the micro-batches' samples of all workers; -1 stands for those whose loss was finite."""
        chosen = [
            part if not torch.isfinite(loss) else torch.full_like(part, -1)
            for loss, part in zip(losses, ids, strict=True)
        ]
        found = distributed.gather(torch.stack(chosen)).flatten().tolist()
        samples = [str(sample) for sample in found if sample >= 0]
        shown = ", ".join(samples[:64]) + (f" and {len(samples) - 64} more" if len(samples) > 64 else "")
        raise NonFiniteLossError(
            f"the loss is not finite at step {step}, in micro-batches of samples {shown}; nothing after "
            f"{self._keeper.last_saved()} was kept. A lower optimizer.lr, clip_norm, a longer schedule.warmup or "
            "precision=bf16 in place of fp16 may help; --resume goes on from there"
        )


def memory_bytes(device: torch.device) -> float:
    """The most memory this worker has used: of its GPU, or of the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
