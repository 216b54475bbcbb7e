"""Keeps what a run leaves behind while it trains: records, checkpoints, and the bar on the terminal."""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from service.config import JobConfig
from service.errors import CheckpointError
from service.registry import better
from service.run_folder import RunFolder
from service.tracking import Run
from service.training import checkpoint, distributed
from service.training.checkpoint import Checkpoint
from service.training.console import Display
from service.training.ema import Ema
from service.training.engine import Engine

_log = logging.getLogger(__name__)


class RunKeeper:
    """One on every worker, since all of them put a checkpoint together; only the main one writes.

    Args:
        run: of the tracking server; None on other workers.
        facts: what a resumed run has to agree with; JSON values.
        spent: what the run has cost so far, asked for on all workers at once.
    """

    def __init__(
        self,
        config: JobConfig,
        folder: RunFolder,
        engine: Engine,
        ema: Ema | None,
        display: Display,
        run: Run | None,
        facts: Mapping[str, Any],
        spent: Callable[[], Mapping[str, float]],
    ) -> None:
        self._config, self._folder = config, folder
        self._engine, self._ema = engine, ema
        self._display, self._run = display, run
        self._facts = dict(facts)
        self._spent = spent
        self._is_main = engine.world.is_main
        self._saved_at = time.monotonic()
        self._best: float | None = None
        self._last: Path | None = None
        self._signal = 0

    def listen(self) -> None:
        """From now on SIGINT and SIGTERM end the run after the step that is running, with a checkpoint."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    def step(self, step: int) -> None:
        """`step` optimizer steps are done."""
        self._display.step(step)

    def record(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep these metrics: on disk, on the tracking server, on the screen."""
        if not self._is_main:
            return
        self._folder.append_metrics(metrics, step)
        if self._run is not None:
            self._run.log_metrics(metrics, step)
        self._display.figures(metrics)
        if "val/top1" in metrics:
            self._display.say(
                f"step {step}: held-out top-1 {metrics['val/top1']:.1%}, class loss {metrics['val/class_loss']:.3f}"
            )

    def save_is_due(self) -> bool:
        """Whether this worker's clock asks for a checkpoint: the main worker's decides."""
        minutes = self._config.checkpoint.every_minutes
        return self._is_main and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation beats those of all checkpoints that are kept; the same answer on every worker."""
        value = metrics.get(self._config.registry.metric)
        return better(value, self._best, self._config.registry.mode)

    def save(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a checkpoint and delete those that are not to be kept; raises StorageError on every worker."""
        parts = {"weights": self._engine.weights(), "optimizer": self._engine.optimizer_state()}
        if self._ema is not None:
            parts["ema"] = dict(self._ema.state_dict())
        facts = self._facts | {"scale": self._engine.scale_state(), "spent": dict(self._spent())}

        def write() -> None:
            checkpoint.save(self._folder.checkpoints, step, parts, facts=facts, metrics=metrics)
            keep, chosen_by = self._config.checkpoint.keep_last, self._config.registry
            checkpoint.prune(self._folder.checkpoints, keep, chosen_by.metric, chosen_by.mode, step)

        distributed.on_main(self._engine.world, write)
        self._last = checkpoint.place(self._folder.checkpoints, step)
        if self.is_best(metrics):
            self._best = metrics[self._config.registry.metric]
        self._saved_at = time.monotonic()

    def go_on_from(self, found: Checkpoint | None) -> None:
        """The run starts from this checkpoint, or from nothing. All workers read the folder before any writes to it."""
        if self._is_main:
            self._folder.forget_after(found.step if found is not None else 0)
        if found is None:
            return
        for path in checkpoint.find(self._folder.checkpoints):
            with contextlib.suppress(CheckpointError):
                kept = checkpoint.read(path)
                if kept.step <= found.step and self.is_best(kept.metrics):
                    self._best = kept.metrics[self._config.registry.metric]
        self._last = found.path

    def last_saved(self) -> str:
        """The newest good checkpoint, for a message."""
        return f"checkpoint {self._last}" if self._last is not None else "the start (no checkpoint yet)"

    def stop_signal(self) -> int:
        """The number of the signal that asked this worker to stop, or 0."""
        return self._signal

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        _log.info("signal %d: stopping after this step", number)
