"""A training job on one of its workers, from the first word with the others to the registered model."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import psutil
import torch

from pipelines.manifest import Manifest
from service import config, data_wait, provenance, report, tracking
from service.config import TrainingConfig
from service.errors import ConfigError, JobError, LostPeerError, stop_code
from service.ownership import Ownership
from service.run_folder import RunFolder
from service.training import console, distributed, entrance, feeding, loop, sample_log
from service.training.checkpoint import Checkpoint
from service.training.distributed import World
from service.training.ema import Ema
from service.training.engine import Engine
from service.training.keeper import RunKeeper
from service.training.left_out import NAME as LEFT_OUT
from service.training.left_out import LeftOut
from service.training.lengths import Lengths
from service.training.meters import Meters
from service.training.signals import Signals
from service.training.starting_point import choose, newest, restore
from service.training.task import Task, open_task
from service.training.watch import Rewind, Watch
from service.training.watchdog import Watchdog

# Of the grace period, for a tracking server to take the last records; what it does not take waits on disk.
_DELIVERY_S = 3.0


def work(job: TrainingConfig, folder: RunFolder, resume: bool, terminal: IO[str] | None, signals: Signals) -> None:
    """Train as the job says, on this worker; raises LorotError, Stopped and whatever else goes wrong."""
    signals.limit(
        job.worker_grace_s, lambda why, code: folder.report_error(JobError(f"{why}; nothing was begun", code))
    )
    world = distributed.connect(job.device, job.timeout_s)
    owner = Ownership(folder.path)

    def take() -> None:
        # First: what is said here of a folder that is another job's would be taken for that job's end.
        owner.take()
        entrance.forget_earlier(folder)
        folder.claim(resume)
        folder.note_end(is_done=False)
        entrance.note_meeting(folder)

    distributed.on_main(world, take)
    # From here on: to index a data set may take the main worker longer than any operation that the others wait in.
    with Watchdog(folder, world, job.timeout_s) as watchdog:
        _train(job, folder, world, resume, terminal, signals, owner, watchdog)


def _train(
    job: TrainingConfig,
    folder: RunFolder,
    world: World,
    resume: bool,
    terminal: IO[str] | None,
    signals: Signals,
    owner: Ownership,
    watchdog: Watchdog,
) -> None:
    """What `work` does in a folder that is its own; `watchdog` watches until the last step."""
    began = time.time()
    if job.deterministic:
        torch.use_deterministic_algorithms(True)
    train_set, eval_set = feeding.open_splits(job, world)
    task = open_task(job, folder, world, train_set, eval_set)
    lengths = Lengths.of(job, task.num_samples)
    torch.manual_seed(job.seed)
    model = task.build()
    facts = task.facts(lengths)
    found = newest(folder, facts, model, world) if resume else None
    taken = task.start(model) if found is None else ""
    ema = Ema(model.to(world.device), job.ema.decay, job.ema.every) if job.ema is not None else None
    engine = Engine(job, model, world)
    if found is not None:
        restore(found, engine, ema)

    meters = task.meters()
    earlier = found.facts.get("spent", {}) if found is not None else {}
    display = console.Display(terminal, lengths.total, found.step if found is not None else 0)
    if taken:
        display.say(taken)
    left_out = LeftOut({"train": train_set, "eval": eval_set}, world)
    if found is not None:
        left_out.load_state(found.facts.get("left_out", {}))

    def evaluate() -> Mapping[str, float] | None:
        network: Callable[..., Any] = ema.module if ema is not None else engine
        (ema.module if ema is not None else engine.module).eval()
        with display.doing("evaluating"), task.open_eval() as batches, engine.autocast():
            left_out.follow("eval", batches.skipped)
            watched = watchdog.through(iter(batches), "waiting for images to evaluate", "evaluating")
            measured = task.evaluate(network, watched, watch.asked_to_stop, watchdog.together)
        return None if measured is None else {f"val/{name}": value for name, value in measured.items()}

    def extra_facts() -> dict[str, Any]:
        spent = _spent(world, began, earlier)
        return {"spent": spent, "meters": distributed.from_each(meters.state()), "progress": watch.state()} | {
            "left_out": left_out.state()
        }

    def fit(first_step: int) -> dict[str, float]:
        with task.open_train(first_step, lengths.total) as batches:
            left_out.follow("train", batches.skipped)
            shown = watchdog.through(iter(batches), "waiting for a batch", "training")
            if not folder.samples.exists():
                shown = _shown(shown, folder, task, run)
            if job.log_samples:
                shown = sample_log.logged(shown, folder.path, world, first_step, engine.accumulation)
            return loop.train(job, lengths, engine, ema, shown, meters, evaluate, keeper, watch, first_step)

    def go_back() -> int:
        keeper.finish_writing()
        newer = choose(folder, world)
        assert newer is not None, "a run that rewinds begins with a checkpoint"
        restore(newer, engine, ema)
        keeper.go_on_from(newer)
        _go_on(newer, meters, watch, world)
        return newer.step

    # A run that is opened is ended in order too: from here on a signal is obeyed after a step.
    signals.defer()
    run = _open_run(job, folder, world, train_set, eval_set, task, lengths, resume) if world.is_main else None
    status = "FAILED"
    # By the other workers, which go on only when all have ended.
    is_awaited = False
    keeper = RunKeeper(job, folder, engine, ema, display, run, facts, extra_facts, owner, watchdog)
    watch = Watch(job, engine, keeper, lambda: signals.number, display.say)
    signals.limit(
        job.worker_grace_s,
        lambda why, code: folder.report_error(JobError(f"{why}; {keeper.last_saved()} is the newest", code)),
    )
    try:
        keeper.go_on_from(found)
        first_step = 0
        if found is not None:
            first_step = found.step
            _go_on(found, meters, watch, world)
            display.say(f"going on from step {first_step} of {lengths.total}")
        elif job.on_nonfinite == "rewind":
            keeper.save(0, {}, wait=True)
        with contextlib.ExitStack() as watched:
            # What comes after the last step is not watched: it takes as long as it takes.
            watched.push(watchdog)
            while True:
                try:
                    metrics = fit(first_step)
                    break
                except Rewind:
                    first_step = go_back()
            if not metrics:
                # Killed after its last step; what was measured then is known, but not the confusion matrix.
                measured = evaluate()
                if measured is None:
                    number = watch.settle()
                    raise JobError(f"stopped after the last step; {keeper.last_saved()} is saved", stop_code(number))
                metrics = dict(measured)
                if found is None or not found.metrics:
                    keeper.record(metrics, lengths.total)
        # Raises if another job has the folder by now: what follows is the end of the run.
        keeper.finish_writing()
        weights = dict(ema.module.state_dict()) if ema is not None else engine.weights()
        used = _spent(world, began, earlier)
        skipped = left_out.write(folder)
        if any(skipped.values()):
            display.say(
                f"left out as unreadable: {skipped['train']} training and {skipped['eval']} evaluation images; "
                f"{folder.path / LEFT_OUT} names them"
            )
        if watch.num_left_out(lengths.total):
            display.say(f"updates left out as not finite: {watch.num_left_out(lengths.total)}; the report names them")
        if run is not None:
            waited = data_wait.median(report.read_history(folder.metrics))
            if reason := data_wait.explain(waited):
                display.say(reason)
            kept = watch.state()
            done = {
                "run_id": run.run_id,
                "data_digest": train_set.digest,
                "versions": provenance.package_versions() | provenance.code_version(),
                "metrics": metrics,
                "images": lengths.total * job.global_batch,
                "skipped_images": skipped,
                "skipped_steps": kept["left_out"],
                "nonfinite_steps": kept["nonfinite_steps"],
                "data_wait_share": waited,
                **used,
            }
            with display.doing("registering"):
                task.leave(run, folder, weights, metrics, done, display)
        status = "FINISHED"
    except JobError as error:
        status = "KILLED" if error.exit_code in (stop_code(signal.SIGINT), stop_code(signal.SIGTERM)) else "FAILED"
        raise
    except BaseException as error:
        is_awaited = isinstance(distributed.explained(error), LostPeerError)
        raise
    finally:
        keeper.close()
        display.close()
        # One that was succeeded has no say in how the run ends.
        if run is not None and not owner.lost:
            notice = run.finish(status, _DELIVERY_S if is_awaited or status == "KILLED" else None)
            if notice:
                display.say(notice)
    if world.is_main:
        # From here on a launcher may end whoever does not end by itself.
        folder.note_end(is_done=True)
    engine.close()
    distributed.disconnect()


def _go_on(found: Checkpoint, meters: Meters, watch: Watch, world: World) -> None:
    """Take up what a checkpoint says about the loop: the window of metrics, and which steps were left out."""
    meters.clear()
    windows = found.facts.get("meters", [])
    # On another number of workers their sums are the same, but for the last bits.
    alike = len(windows) == world.size
    for window in windows[world.rank : world.rank + 1] if alike else windows if world.is_main else []:
        meters.add_state(window)
    watch.load_state(found.facts.get("progress", {}))


def _open_run(
    job: TrainingConfig,
    folder: RunFolder,
    world: World,
    train_set: Manifest,
    eval_set: Manifest,
    task: Task,
    lengths: Lengths,
    resume: bool,
) -> tracking.Run:
    # Made by the job service when the job was submitted.
    scheduled = os.environ.get("LOROT_RUN_ID") or None
    earlier = folder.read("run.json") if resume or scheduled else {}
    if scheduled and earlier.get("run_id", scheduled) != scheduled:
        raise ConfigError(
            f"{folder.path}: holds run {earlier['run_id']}, and this job is run {scheduled} (LOROT_RUN_ID); move the "
            "folder away, or unset LOROT_RUN_ID to go on with the run that is there"
        )
    run = tracking.open_run(
        job.tracking,
        name=job.name,
        folder=folder.path,
        run_id=earlier.get("run_id"),
        scheduled=scheduled,
        tags={
            "data.name": train_set.name,
            "data.digest": train_set.digest,
            "data.eval_digest": eval_set.digest,
            "world_size": world.size,
            "device": world.device.type,
            **task.tags(),
        },
    )
    folder.write("run.json", run.about() | {"total_steps": lengths.total})
    resolved = folder.path / "config.yaml"
    resolved.write_text(config.dump(job))
    run.log_params(job.model_dump(mode="json"))
    run.log_artifact(resolved)
    return run


def _shown(batches: Iterator[Any], folder: RunFolder, task: Task, run: tracking.Run | None) -> Iterator[Any]:
    """The same batches; of the first one a picture is kept."""
    for number, batch in enumerate(batches):
        if number == 0 and run is not None:
            task.show(batch, folder.samples)
            run.log_artifact(folder.samples)
        yield batch


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
