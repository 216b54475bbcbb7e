"""What torchrun starts on every worker: `... -m service.training.worker CONFIG [key.sub=value ...] [--resume]`."""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import psutil
import torch

from pipelines import loading, pretext
from pipelines.batch import Batch
from pipelines.manifest import Manifest
from pipelines.plan import View
from service import bundle, config, data_wait, models, pictures, provenance, registry, report, tracking
from service.bundle import Card
from service.config import JobConfig
from service.errors import ConfigError, JobError
from service.run_folder import RunFolder
from service.training import console, distributed, entrance, evaluation, feeding, loop, objectives
from service.training.distributed import World
from service.training.ema import Ema
from service.training.engine import Engine
from service.training.keeper import RunKeeper
from service.training.lengths import Lengths
from service.training.meters import Meters
from service.training.starting_point import facts_of, newest, start_from

_log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run one worker to its end; returns its exit code."""
    parser = argparse.ArgumentParser(prog="service.training.worker", description=__doc__)
    parser.add_argument("config", help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values on top of it")
    parser.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint")
    given = parser.parse_args(arguments)

    def train(job: JobConfig, folder: RunFolder, terminal: IO[str] | None) -> None:
        work(job, folder, given.resume, terminal)

    return entrance.enter(given.config, given.overrides, train)


def work(job: JobConfig, folder: RunFolder, resume: bool, terminal: IO[str] | None) -> None:
    """Train as the job says, on this worker; raises LorotError and whatever else goes wrong."""
    began = time.time()
    world = distributed.connect(job.device)
    distributed.on_main(world, lambda: folder.claim(resume))
    if job.deterministic:
        torch.use_deterministic_algorithms(True)
    train_set, eval_set = feeding.open_splits(job, world)
    if train_set.classes != eval_set.classes:
        raise ConfigError(
            f"data.eval_split: {job.data.eval_split!r} has {len(eval_set.classes)} classes, {job.data.train_split!r} "
            f"has {len(train_set.classes)}, or they are named differently"
        )
    lengths = Lengths.of(job, len(train_set))
    task = pretext.load(job.pretext.name, **job.pretext.options)
    num_pretext = task.num_labels if objectives.learns_pretext(job.objective.name) else 0
    torch.manual_seed(job.seed)
    model = models.build(job.model, len(train_set.classes), num_pretext)
    facts = facts_of(job, lengths, train_set, eval_set)
    found = newest(folder, facts, model, world) if resume else None
    first_step = found.step if found is not None else 0
    if found is None and job.model.init_from:
        start_from(model, job.model.init_from, job.tracking.uri)
    ema = Ema(model.to(world.device), job.ema.decay, job.ema.every) if job.ema is not None else None
    engine = Engine(job, model, world)
    if found is not None:
        engine.load_optimizer_state(found.tensors("optimizer"))
        engine.load_scale_state(found.facts.get("scale", {}))
        if ema is not None:
            ema.load_state_dict(found.tensors("ema"))

    options = feeding.loader_options(job, world)
    train_source, eval_source = feeding.train_source(job, train_set, task), feeding.eval_source(job, eval_set)
    view = train_source.view
    meters = Meters(
        len(train_set.classes),
        objectives.loss_names(job.objective.name),
        device=world.device,
        rank=world.rank,
        world_size=world.size,
    )
    earlier = found.facts.get("spent", {}) if found is not None else {}
    display = console.Display(terminal, lengths.total, first_step)
    confusion: Any = None
    left_out: dict[str, dict[int, str]] = {"train": {}, "eval": {}}

    def evaluate() -> Mapping[str, float]:
        nonlocal confusion
        network: Callable[..., Any] = ema.module if ema is not None else engine
        (ema.module if ema is not None else engine.module).eval()
        with (
            display.doing("evaluating"),
            loading.open_eval(job.data.loader, eval_source, batch_size=job.micro_batch, **options) as batches,
            engine.autocast(),
        ):
            summary = evaluation.evaluate(network, batches, len(eval_set.classes), world)
            left_out["eval"] |= batches.skipped
        confusion = summary.confusion
        return {f"val/{name}": value for name, value in summary.metrics.items()}

    run = _open_run(job, folder, world, train_set, eval_set, resume) if world.is_main else None
    status = "FAILED"
    try:
        keeper = RunKeeper(job, folder, engine, ema, display, run, facts, lambda: _spent(world, began, earlier))
        keeper.go_on_from(found)
        if found is not None:
            display.say(f"going on from step {found.step} of {lengths.total}")
        keeper.listen()
        with loading.open_train(
            job.data.loader,
            train_source,
            start_step=first_step,
            stop_step=lengths.total,
            global_batch=job.global_batch,
            micro_batch=job.micro_batch,
            **options,
        ) as batches:
            left_out["train"] = batches.skipped
            shown = _shown(batches, folder, train_set, view, run)
            metrics = loop.train(job, lengths, engine, ema, shown, meters, evaluate, keeper, first_step)
        if not metrics:
            metrics = dict(evaluate())
            keeper.record(metrics, lengths.total)
        weights = dict(ema.module.state_dict()) if ema is not None else engine.weights()
        used = _spent(world, began, earlier)
        skipped = {split: len(distributed.union(set(bad), world)) for split, bad in left_out.items()}
        if any(skipped.values()):
            display.say(
                f"left out as unreadable: {skipped['train']} training and {skipped['eval']} evaluation images; "
                f"{folder.path}/log-rank*.txt name them"
            )
        if run is not None:
            waited = data_wait.median(report.read_history(folder.metrics))
            if reason := data_wait.explain(waited):
                display.say(reason)
            card = _card(job, train_set, view, num_pretext, metrics, run.run_id)
            done = {
                "run_id": run.run_id,
                "data_digest": train_set.digest,
                "versions": card.versions,
                "metrics": metrics,
                "images": lengths.total * job.global_batch,
                "skipped_images": skipped,
                "data_wait_share": waited,
                **used,
            }
            with display.doing("registering"):
                finish(job, folder, run, card, weights, confusion, done, display)
        status = "FINISHED"
    except JobError as error:
        status = "KILLED" if error.exit_code > 128 else "FAILED"
        raise
    finally:
        display.close()
        if run is not None:
            notice = run.finish(status)
            if notice:
                display.say(notice)
    engine.close()
    distributed.disconnect()


def finish(
    job: JobConfig,
    folder: RunFolder,
    run: tracking.Run,
    card: Card,
    weights: Mapping[str, torch.Tensor],
    confusion: Any,
    done: Mapping[str, Any],
    display: console.Display,
) -> None:
    """Write the model, register it, and leave the summary; on the main worker."""
    bundle.write_bundle(folder.model, weights, card)
    summary: dict[str, Any] = {"name": job.name, "model_name": job.model_name or None, "model_version": None, **done}
    if confusion is not None:
        folder.write(folder.confusion.name, {"classes": list(card.classes), "matrix": confusion.tolist()})
        run.log_artifact(folder.confusion)
    if job.model_name:
        try:
            summary["model_version"] = registry.register(
                folder.model,
                name=job.model_name,
                run_id=run.run_id,
                metric=job.registry.metric,
                mode=job.registry.mode,
                tracking_uri=job.tracking.uri,
            )
            display.say(f"registered as models:/{job.model_name}/{summary['model_version']}")
        finally:
            # Whatever the registry says: the training is done, and its results are not to be lost.
            folder.write(folder.summary.name, summary)
    run.log_artifact(folder.write(folder.summary.name, summary))
    run.log_artifact(report.write(folder.path, folder.path / "report.html"))


def _open_run(
    job: JobConfig, folder: RunFolder, world: World, train_set: Manifest, eval_set: Manifest, resume: bool
) -> tracking.Run:
    earlier = folder.read("run.json") if resume else {}
    run = tracking.open_run(
        job.tracking,
        name=job.name,
        folder=folder.path,
        run_id=earlier.get("run_id"),
        tags={
            "data.name": train_set.name,
            "data.digest": train_set.digest,
            "data.eval_digest": eval_set.digest,
            "world_size": world.size,
            "device": world.device.type,
        },
    )
    folder.write("run.json", {"run_id": run.run_id, "experiment": run.experiment, "tracking_uri": run.uri})
    resolved = folder.path / "config.yaml"
    resolved.write_text(config.dump(job))
    run.log_params(job.model_dump(mode="json"))
    run.log_artifact(resolved)
    return run


def _shown(
    batches: Iterator[Batch], folder: RunFolder, manifest: Manifest, view: View, run: tracking.Run | None
) -> Iterator[Batch]:
    """The same batches; of the first one a picture is kept."""
    for number, batch in enumerate(batches):
        if number == 0 and run is not None:
            images = batch.images[:16].float().cpu().contiguous().numpy()
            captions = [manifest.classes[label] for label in batch.labels[:16].tolist()]
            pictures.write_samples(
                pictures.denormalise(images, view.mean, view.std),
                captions,
                batch.boxes[:16].cpu().numpy(),
                batch.turns[:16].cpu().numpy(),
                folder.samples,
            )
            run.log_artifact(folder.samples)
        yield batch


def _card(
    job: JobConfig, train_set: Manifest, view: View, num_pretext: int, metrics: Mapping[str, float], run_id: str
) -> Card:
    return Card(
        model=job.model.model_dump(mode="json"),
        classes=tuple(train_set.classes),
        view=bundle.evaluation_view(view),
        training_view={
            "size": view.size,
            "sizes": [part.model_dump(mode="json") for part in job.data.sizes],
            "augment": [part.model_dump(mode="json") for part in job.data.augment],
            "repeats": job.data.repeats,
        },
        data=job.data.name,
        data_digest=train_set.digest,
        data_options=dict(job.data.options),
        root=str(job.data.root),
        split=job.data.eval_split,
        pretext=job.pretext.name,
        pretext_options=dict(job.pretext.options),
        num_pretext=num_pretext,
        objective=job.objective.name,
        metrics=dict(metrics),
        chosen_by=job.registry.metric,
        run_id=run_id,
        run_name=job.name,
        versions=provenance.package_versions() | provenance.code_version(),
    )


def _spent(world: World, began: float, earlier: Mapping[str, float]) -> dict[str, float]:
    """Wall time since `began`, and what all workers have used since they started, on top of an earlier part's."""
    times = psutil.Process().cpu_times()
    own = torch.tensor(
        [times.user + times.system, loop.memory_bytes(world.device)], dtype=torch.float64, device=world.device
    )
    core_s, memory = distributed.all_sum(own).tolist()
    return {
        "wall_s": earlier.get("wall_s", 0.0) + time.time() - began,
        "cpu_core_s": earlier.get("cpu_core_s", 0.0) + core_s,
        "peak_memory_bytes": max(earlier.get("peak_memory_bytes", 0.0), memory),
    }


if __name__ == "__main__":
    sys.exit(main())
