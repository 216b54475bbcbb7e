"""Keeps what a run leaves behind while it trains: records, checkpoints, and the bar on the terminal."""

import contextlib
import copy
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from service.config import TrainingConfig
from service.errors import CheckpointError, StorageError
from service.ownership import Ownership
from service.registry import better
from service.run_folder import RunFolder
from service.tracking import Run
from service.training import checkpoint, console, distributed
from service.training.checkpoint import Checkpoint
from service.training.console import Display
from service.training.ema import Ema
from service.training.engine import Engine
from service.training.retention import Retention
from service.training.watchdog import Watchdog
from service.training.writer import HostCopy, Writer

_log = logging.getLogger(__name__)

# Checkpoints that the clock asks for keep training waiting for at most this share of the time, and their writing may
# keep the disk busy for at most that one, however often they are asked for.
STALL_SHARE = 0.02
WRITING_SHARE = 0.2


class RunKeeper:
    """One on every worker, since all of them put a checkpoint together; only the main one writes.

    A checkpoint is copied to host memory while training waits, and written while it goes on.

    Args:
        run: of the tracking server; None on other workers.
        facts: what a resumed run has to agree with; JSON values.
        extra_facts: what else a checkpoint has to hold, by name, JSON values; asked for on all workers at once.
        owner: of the folder, on the main worker; None: nobody else could have it.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: RunFolder,
        engine: Engine,
        ema: Ema | None,
        display: Display,
        run: Run | None,
        facts: Mapping[str, Any],
        extra_facts: Callable[[], Mapping[str, Any]],
        owner: Ownership | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._config, self._folder = config, folder
        self._engine, self._ema = engine, ema
        self._display, self._run = display, run
        self._facts = dict(facts)
        self._extra_facts = extra_facts
        self._owner = owner
        self._watchdog = watchdog
        self._is_main = engine.world.is_main
        self._copy = HostCopy(pinned=engine.world.device.type == "cuda")
        self._writer = Writer()
        self._retention = Retention(config.checkpoint.keep_last, config.registry.metric, config.registry.mode)
        self._saved_at = time.monotonic()
        self._stall_s = 0.0
        self._best: float | None = None
        self._last: Path | None = None
        self._begun: Path | None = None

    def step(self, step: int) -> None:
        """`step` optimizer steps are done."""
        self._display.step(step)
        if self._watchdog is not None:
            self._watchdog.step(step)

    def record(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep these metrics: on disk, on the tracking server, on the screen; not in what is another job's by now."""
        if not self._is_main or self._is_succeeded():
            return
        self._folder.append_metrics(metrics, step)
        if self._run is not None:
            self._run.log_metrics(metrics, step)
        self._display.figures(metrics)
        if told := console.held_out(metrics):
            self._display.say(f"step {step}: held-out {told}")

    def save_is_due(self) -> bool:
        """Whether this worker's clock asks for a checkpoint: the main worker's decides.

        Where saving takes long, it asks less often than it was told to: see STALL_SHARE and WRITING_SHARE.
        """
        minutes = self._config.checkpoint.every_minutes
        if not self._is_main or minutes is None or self._writer.is_busy:
            return False
        pause_s = max(60 * minutes, self._stall_s / STALL_SHARE, self._writer.took_s / WRITING_SHARE)
        return time.monotonic() - self._saved_at >= pause_s

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation beats those of all checkpoints that are kept; the same answer on every worker."""
        value = metrics.get(self._config.registry.metric)
        return better(value, self._best, self._config.registry.mode)

    def save(self, step: int, metrics: Mapping[str, float], *, wait: bool = False) -> None:
        """Keep the state of this moment; all workers call it.

        The state is put together and copied now, after the writing before has ended; then it is written, and what is
        not to be kept is deleted, while training goes on.

        Args:
            wait: return when it is on the disk.

        Raises:
            StorageError: on every worker: the writing before has failed; with `wait` this one.
        """
        began = time.monotonic()
        distributed.on_main(self._engine.world, self._writer.wait)
        parts = {"weights": self._engine.weights(), "optimizer": self._engine.optimizer_state()}
        if self._ema is not None:
            parts["ema"] = dict(self._ema.state_dict())
        extra = self._extra_facts()
        if self._is_main:
            # Nothing that the loop goes on changing may be in it.
            facts = copy.deepcopy(self._facts | {"scale": self._engine.scale_state()} | dict(extra))
            copies, measured = self._copy.take(parts), dict(metrics)
            self._writer.start(lambda: self._write(step, copies, facts, measured))
        self._begun = checkpoint.place(self._folder.checkpoints, step)
        if self.is_best(metrics):
            self._best = metrics[self._config.registry.metric]
        self._saved_at = time.monotonic()
        self._stall_s = self._saved_at - began
        _log.info("checkpoint of step %d: training waited for %.3f s", step, self._stall_s)
        if wait:
            self.finish_writing()

    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way to the disk."""
        return self._writer.is_busy

    def write_failed(self) -> bool:
        """Whether a checkpoint could not be written, or none can be any more, since another job has the folder.

        As far as this worker knows: `finish_writing` says why.
        """
        return self._writer.has_failed or self._is_succeeded()

    def finish_writing(self) -> None:
        """Wait until all is on the disk; all workers call it.

        Raises:
            StorageError: on every one: it could not be written, or another job has the folder.
        """

        def end() -> None:
            self._writer.wait()
            if self._owner is not None:
                self._owner.check()

        distributed.on_main(self._engine.world, end)
        self._last = self._begun or self._last

    def close(self) -> None:
        """End in any case, on this worker alone: what is being written is written to its end, the folder let go."""
        with contextlib.suppress(StorageError):
            self._writer.wait()
        if self._owner is not None:
            self._owner.release()

    def _is_succeeded(self) -> bool:
        return self._owner is not None and self._owner.lost

    def _write(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        facts: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> None:
        permit = self._owner.check if self._owner is not None else lambda: None
        folder = self._folder.checkpoints
        self._retention.written(checkpoint.save(folder, step, parts, facts=facts, metrics=metrics, permit=permit))
        self._retention.prune(folder, step)

    def go_on_from(self, found: Checkpoint | None) -> None:
        """The run goes on from this checkpoint, or from nothing. All workers call it.

        Nothing is being written meanwhile.
        """
        self._best, self._last, self._begun = None, None, None
        self._saved_at = time.monotonic()
        if self._is_main:
            # What was owed is measured again, and what a run killed in between had recorded of it would be there twice.
            owed = found is not None and bool(found.facts.get("progress", {}).get("owes_evaluation"))
            self._folder.forget_after(found.step if found is not None else 0, unevaluated=owed)
        if found is None:
            return
        # A shared disk may show workers different things, and they have to agree on what is best.
        seen: list[float] = []
        distributed.on_main(self._engine.world, lambda: seen.extend(self._best_until(found.step)))
        told = distributed.from_main(json.dumps(seen), self._engine.world.device)
        self._best = next(iter(json.loads(told)), None)
        self._last = found.path

    def _best_until(self, step: int) -> list[float]:
        """The best metric of the checkpoints up to `step`; empty if none has it."""
        best: float | None = None
        name, mode = self._config.registry.metric, self._config.registry.mode
        for path in checkpoint.find(self._folder.checkpoints):
            with contextlib.suppress(CheckpointError):
                kept = checkpoint.read(path)
                if kept.step <= step and better(kept.metrics.get(name), best, mode):
                    best = kept.metrics[name]
        return [] if best is None else [best]

    def last_saved(self) -> str:
        """The newest checkpoint that is whole on the disk, for a message; one that is being written is none."""
        # It gets its name when it is whole.
        begun = self._begun if self._begun is not None and self._begun.is_dir() else None
        last = begun or self._last
        return f"checkpoint {last}" if last is not None else "the start (no checkpoint yet)"
