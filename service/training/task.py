"""What a training job is told about that which it trains: a protocol, and one module for each kind of job.

Loop, checkpoints, watch, watchdog, record and launcher are the same for all of them and know none by name. A new kind
is a module here, with `learn` and `open_task`, and a configuration of its own in `service.config.KINDS`.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pipelines.manifest import Manifest
from service.config import TrainingConfig
from service.run_folder import RunFolder
from service.tracking import Run
from service.training.console import Display
from service.training.distributed import World
from service.training.engine import Engine
from service.training.lengths import Lengths
from service.training.meters import Meters

_MODULES = {"classify": "classification", "detect": "detection", "segment": "detection"}


class Samples(Protocol):
    """A micro-batch on the device, as far as the loop is concerned: (N,) int64 ids of its samples."""

    @property
    def ids(self) -> Tensor: ...


class Batches(Protocol):
    """An opened loader; `skipped` names the samples it has left out so far, and why."""

    @property
    def skipped(self) -> Mapping[int, str]: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...


class Task(Protocol):
    """What is trained, on one worker; all of them call its methods alike, but for `show` and `leave`."""

    @property
    def num_samples(self) -> int:
        """Samples there are to train on; `data.train_limit` may keep fewer of them."""
        ...

    def build(self) -> nn.Module:
        """The network, drawn from torch's global random state; raises CheckpointError if it stands on what is none."""
        ...

    def start(self, model: nn.Module) -> str:
        """Give a new run's network what it begins with; returns what there is to tell about it, or nothing."""
        ...

    def facts(self, lengths: Lengths) -> dict[str, Any]:
        """What a resumed run has to agree with, JSON values by name; known once the network is built."""
        ...

    def tags(self) -> dict[str, Any]:
        """For the run's record: what the task knows about where it comes from."""
        ...

    def meters(self) -> Meters:
        """The metrics of a window of training steps."""
        ...

    def open_train(self, first_step: int, stop_step: int) -> AbstractContextManager[Batches]:
        """This worker's micro-batches of steps `first_step` to `stop_step` - 1, in order."""
        ...

    def open_eval(self) -> AbstractContextManager[Batches]:
        """This worker's share of the held-out samples, as many batches as any other's."""
        ...

    def evaluate(
        self,
        network: Callable[..., Any],
        batches: Iterator[Any],
        asked_to_stop: Callable[[], bool],
        together: Callable[[str], AbstractContextManager[None]],
    ) -> dict[str, float] | None:
        """Metrics over all workers' samples, the same on each; None if a signal asked to stop, or any other's did.

        Args:
            network: in evaluation mode.
            batches: of `open_eval`.
            asked_to_stop: to be asked before every batch.
            together: of a phase's name makes a context for work after the last batch that may take minutes, which all
                workers enter.
        """
        ...

    def show(self, batch: Any, path: Path) -> None:
        """Write a picture of the first samples of a training batch; on the main worker."""
        ...

    def leave(
        self,
        run: Run,
        folder: RunFolder,
        weights: Mapping[str, Tensor],
        metrics: Mapping[str, float],
        done: Mapping[str, Any],
        display: Display,
    ) -> None:
        """Write the trained network, its summary and what else is to stay, and have it recorded; on the main worker.

        Args:
            weights: to be kept: those that were evaluated.
            metrics: of the last evaluation.
            done: what the run was and what it cost, for summary.json.

        Raises:
            StorageError: something could not be written.
        """
        ...


class _Kind(Protocol):
    """A module of `_MODULES`."""

    def learn(self, config: Any, engine: Engine, batch: Any, meters: Meters) -> Tensor:
        """The loss to minimise of one micro-batch, a mean over its samples; the rest of it goes to the meters."""
        ...

    def open_task(self, config: Any, folder: RunFolder, world: World, train_set: Manifest, eval_set: Manifest) -> Task:
        """The task of a job; raises LorotError if the data or what it stands on do not fit. All workers call it."""
        ...


def learning(config: TrainingConfig) -> Callable[[Any, Engine, Any, Meters], Tensor]:
    """`learn` of the job's kind."""
    return _kind(config).learn


def open_task(config: TrainingConfig, folder: RunFolder, world: World, train_set: Manifest, eval_set: Manifest) -> Task:
    """The task of a job, of the job's kind; raises LorotError as that does."""
    return _kind(config).open_task(config, folder, world, train_set, eval_set)


def _kind(config: TrainingConfig) -> _Kind:
    module: Any = importlib.import_module(f"service.training.{_MODULES[config.job]}")
    found: _Kind = module
    return found
