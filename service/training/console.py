"""What a worker shows: its own few lines on the terminal; everything else that anybody prints goes to a log file."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from service import data_wait

_EVERY_S = 10.0
# What is shown of training metrics, and of an evaluation's, as far as they are there.
_FIGURES = (
    ("images/s", "train/images_per_s", "{:,.0f}"),
    ("loss", "train/loss", "{:.3f}"),
    ("top-1", "train/top1", "{:.1%}"),
    ("pretext", "train/pretext_accuracy", "{:.1%}"),
)
_HELD_OUT = (
    ("top-1", "val/top1", "{:.1%}"),
    ("class loss", "val/class_loss", "{:.3f}"),
    ("AP", "val/AP", "{:.1%}"),
    ("AP at IoU 0.5", "val/AP50", "{:.1%}"),
)


def capture(log: Path) -> IO[str]:
    """Send file descriptors 1 and 2, and Python's logging, to `log`; returns the terminal that 1 was.

    Descriptors, because libraries write from native code too, and their child processes inherit them.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    logging.captureWarnings(True)
    return terminal


def held_out(metrics: Mapping[str, float]) -> str:
    """What an evaluation has found, in a few words; empty if these metrics are none's."""
    return ", ".join(_told(_HELD_OUT, metrics))


class Display:
    """Progress of a training job on the main worker: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, terminal: IO[str] | None, total_steps: int, first_step: int = 0) -> None:
        """Without a terminal it shows nothing."""
        self._console = Console(file=terminal, quiet=terminal is None, highlight=False, soft_wrap=True)
        self._total = total_steps
        self._said = time.monotonic()
        # From the end of the first step on, which also opens the data and compiles.
        self._counted: tuple[int, float] | None = None
        self._figures = ""
        self._progress: Progress | None = None
        if self._console.is_terminal and terminal is not None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task("training", total=total_steps, completed=first_step, figures="")
            self._progress.start()

    def step(self, step: int) -> None:
        """`step` optimizer steps are done."""
        now = time.monotonic()
        first, began = self._counted = self._counted or (step, now)
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        elif now - self._said >= _EVERY_S or step == self._total:
            self._said = now
            left = f"{(now - began) / (step - first) * (self._total - step):.0f} s left" if step > first else ""
            self.say("  ".join(filter(None, (f"step {step}/{self._total}", self._figures, left))))

    def figures(self, metrics: Mapping[str, float]) -> None:
        """The newest training metrics."""
        found = _told(_FIGURES, metrics)
        if metrics.get(data_wait.METRIC, 0.0) > data_wait.NOTABLE:
            found.append(f"waiting for data {metrics[data_wait.METRIC]:.0%}")
        self._figures = "  ".join(found) or self._figures
        if self._progress is not None:
            self._progress.update(self._task, figures=self._figures)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """While the block runs, the bar says so."""
        if self._progress is not None:
            self._progress.update(self._task, description=what)
        yield
        if self._progress is not None:
            self._progress.update(self._task, description="training")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _told(shown: Iterable[tuple[str, str, str]], metrics: Mapping[str, float]) -> list[str]:
    return [f"{name} {form.format(metrics[key])}" for name, key, form in shown if key in metrics]
