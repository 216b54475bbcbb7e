"""Training a classifier, by any of the objectives: what `lorot train` does by default."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipelines import loading, pretext
from pipelines.batch import Batch
from pipelines.manifest import Manifest
from service import models, pictures
from service.config import JobConfig
from service.errors import ConfigError
from service.run_folder import RunFolder
from service.tracking import Run
from service.training import evaluation, feeding, objectives, results
from service.training.card import card_of
from service.training.console import Display
from service.training.distributed import World
from service.training.engine import Engine
from service.training.lengths import Lengths
from service.training.meters import Meters
from service.training.starting_point import facts_of, start_from
from service.training.task import Batches


def learn(config: JobConfig, engine: Engine, batch: Batch, meters: Meters) -> Tensor:
    """The objective's loss of one micro-batch."""
    result = objectives.compute(engine, batch, config.objective)
    meters.update(result, batch.labels, batch.valid)
    return result.losses["loss"]


def open_task(
    config: JobConfig, folder: RunFolder, world: World, train_set: Manifest, eval_set: Manifest
) -> "Classification":
    """The task of a classifier's job; raises ConfigError if both splits do not have the same classes."""
    return Classification(config, world, train_set, eval_set)


class Classification:
    """A classifier, with a head for the pretext task if the objective learns one."""

    def __init__(self, job: JobConfig, world: World, train_set: Manifest, eval_set: Manifest) -> None:
        if train_set.classes != eval_set.classes:
            raise ConfigError(
                f"data.eval_split: {job.data.eval_split!r} has {len(eval_set.classes)} classes, "
                f"{job.data.train_split!r} has {len(train_set.classes)}, or they are named differently"
            )
        self._job, self._world = job, world
        self._train_set, self._eval_set = train_set, eval_set
        task = pretext.load(job.pretext.name, **job.pretext.options)
        self._num_pretext = task.num_labels if objectives.learns_pretext(job.objective.name) else 0
        self._train_source = feeding.train_source(job, train_set, task)
        self._eval_source = feeding.eval_source(job, eval_set)
        self._options = feeding.loader_options(job, world)
        self._confusion: Any = None

    @property
    def num_samples(self) -> int:
        return len(self._train_set)

    def build(self) -> nn.Module:
        return models.build(self._job.model, len(self._train_set.classes), self._num_pretext)

    def start(self, model: nn.Module) -> str:
        uri = self._job.model.init_from
        return start_from(model, uri, self._job.tracking.uri) if uri else ""

    def facts(self, lengths: Lengths) -> dict[str, Any]:
        return facts_of(self._job, lengths, self._train_set, self._eval_set)

    def tags(self) -> dict[str, Any]:
        return {}

    def meters(self) -> Meters:
        names = objectives.loss_names(self._job.objective.name)
        return Meters(
            len(self._train_set.classes),
            names,
            device=self._world.device,
            rank=self._world.rank,
            world_size=self._world.size,
        )

    def open_train(self, first_step: int, stop_step: int) -> AbstractContextManager[Batches]:
        return loading.open_train(
            self._job.data.loader,
            self._train_source,
            start_step=first_step,
            stop_step=stop_step,
            global_batch=self._job.global_batch,
            micro_batch=self._job.micro_batch,
            **self._options,
        )

    def open_eval(self) -> AbstractContextManager[Batches]:
        batch_size = self._job.micro_batch
        return loading.open_eval(self._job.data.loader, self._eval_source, batch_size=batch_size, **self._options)

    def evaluate(
        self,
        network: Callable[..., Any],
        batches: Iterator[Batch],
        asked_to_stop: Callable[[], bool],
        together: Callable[[str], AbstractContextManager[None]],
    ) -> dict[str, float] | None:
        classes = len(self._eval_set.classes)
        summary = evaluation.evaluate(network, batches, classes, self._world, asked_to_stop)
        if summary is None:
            return None
        self._confusion = summary.confusion
        return summary.metrics

    def show(self, batch: Batch, path: Path) -> None:
        images = batch.images[:16].float().cpu().contiguous().numpy()
        view = self._train_source.view
        pictures.write_samples(
            pictures.denormalise(images, view.mean, view.std),
            [self._train_set.classes[label] for label in batch.labels[:16].tolist()],
            batch.boxes[:16].cpu().numpy(),
            batch.turns[:16].cpu().numpy(),
            path,
        )

    def leave(
        self,
        run: Run,
        folder: RunFolder,
        weights: Mapping[str, Tensor],
        metrics: Mapping[str, float],
        done: Mapping[str, Any],
        display: Display,
    ) -> None:
        view = self._train_source.view
        card = card_of(self._job, self._train_set, view, self._num_pretext, metrics, run.run_id)
        results.finish(self._job, folder, run, card, weights, self._confusion, done, display)
