"""What a configuration amounts to, before anything is started: `lorot check`."""

import contextlib
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from pipelines import datasets, pretext
from pipelines.amounts import shown_bytes
from service import config, machine
from service.config import JobConfig, ModelConfig
from service.data_config import AugmentConfig
from service.errors import DataError
from service.jobs.local import num_workers
from service.splits import use_cache
from service.training.lengths import Lengths, sizes
from service.training.schedule import learning_rate

if TYPE_CHECKING:
    from service.models import Classifier

_FLOAT = 4
_BARS = "▁▂▃▄▅▆▇█"
_POINTS = 48
# Assumed of data that is not there, so that the network can still be counted.
_CLASSES_UNKNOWN = 1000
# Of a worker that has loaded torch, DALI, DeepSpeed and MLflow: the quickstart's peak at 1.10 GB each on a CPU, 0.05 GB
# of it by what is counted below.
_PROCESS_BYTES = 1_050_000_000
_STATES = {"sgd": 1, "adamw": 2, "lamb": 2}


@dataclass(frozen=True)
class Split:
    """One split of the data set: how many samples it holds, of how many classes; `note` says where it is."""

    name: str
    samples: int
    classes: int
    note: str


@dataclass(frozen=True)
class Plan:
    """The run in numbers; optimizer steps, samples per epoch, learning rates at evenly spaced steps."""

    samples_per_epoch: int
    total_steps: int
    evaluations: int
    checkpoints: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Findings:
    """What `examine` found out.

    Attributes:
        workers, accumulation: processes, and micro-batches each adds up per step.
        splits: those that are there; missing: why the others are not.
        plan: None while the data is missing.
        classes, parameters, pretext_parameters: of the network.
        memory: bytes a worker needs, by what for. A rough estimate.
        checkpoint_bytes, storage_bytes, free_bytes: one checkpoint; all that are kept at once; what the disk has left.
        warnings: what would run, but badly.
    """

    job: JobConfig
    workers: int
    accumulation: int
    splits: tuple[Split, ...]
    missing: tuple[str, ...]
    plan: Plan | None
    classes: int
    parameters: int
    pretext_parameters: int
    memory: dict[str, int]
    checkpoint_bytes: int
    storage_bytes: int
    free_bytes: int
    warnings: tuple[str, ...] = field(default=())


def examine(job: JobConfig, workers: int | None = None) -> Findings:
    """Work out what `job` would do on `workers` processes of this machine; raises ConfigError as training would."""
    count = num_workers(job, workers)
    accumulation = config.accumulation_steps(job, count)
    splits, missing = _splits(job)
    classes = splits[0].classes if splits else _CLASSES_UNKNOWN
    model = network(job.model, classes, num_pretext_labels(job))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    heads = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("pretext_fc"))
    memory = estimate_memory(job, model, count)
    states = 1 + _STATES[job.optimizer.name] + (job.ema is not None)
    checkpoint = parameters * _FLOAT * states
    # The newest ones, the best, the one being written, the model's own file and its copy in the registry.
    storage = checkpoint * (job.checkpoint.keep_last + 2) + 2 * parameters * _FLOAT
    free = shutil.disk_usage(_existing(job.folder)).free
    return Findings(
        job=job,
        workers=count,
        accumulation=accumulation,
        splits=splits,
        missing=missing,
        plan=plan(job, splits[0].samples) if not missing else None,
        classes=classes,
        parameters=parameters,
        pretext_parameters=heads,
        memory=memory,
        checkpoint_bytes=checkpoint,
        storage_bytes=storage,
        free_bytes=free,
        warnings=tuple(_warnings(job, count, sum(memory.values()), storage, free)),
    )


def plan(job: JobConfig, samples: int) -> Plan:
    """Steps, evaluations, checkpoints and learning rates of a run on a training set of `samples`."""
    lengths = Lengths.of(job, samples)
    # Raises what training would.
    sizes(job, lengths.samples)
    total = lengths.total
    at = sorted({round(point * (total - 1) / (_POINTS - 1)) for point in range(_POINTS)})
    rates = tuple(
        learning_rate(job.schedule, job.optimizer.lr, step, total, lengths.samples, job.global_batch) for step in at
    )
    saves = math.ceil(total / lengths.save) if lengths.save else 0
    return Plan(lengths.samples, total, math.ceil(total / lengths.evaluate), saves, rates)


def num_pretext_labels(job: JobConfig) -> int:
    """Outputs of the pretext head: 0 if the objective has no pretext loss."""
    from service.training import objectives

    if not objectives.learns_pretext(job.objective.name):
        return 0
    return pretext.load(job.pretext.name, **job.pretext.options).num_labels


def network(model: ModelConfig, classes: int, pretext_labels: int) -> "Classifier":
    """The network without memory for its weights (on torch's meta device)."""
    import torch

    from service import models

    with torch.device("meta"):
        return models.build(model, classes, pretext_labels)


def activation_bytes(model: "Classifier", size: int, samples: int = 2) -> int:
    """Bytes in fp32 that one training sample of (3, size, size) keeps for the backward pass, counted without data."""
    import torch

    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # Holding the storage keeps its address from being given to the next one.
            kept[storage._cdata] = storage
        return tensor

    images = torch.empty(samples, 3, size, size, device="meta").contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model.train()(images)
    del outputs
    return sum(storage.nbytes() for storage in kept.values()) // samples


def estimate_memory(job: JobConfig, model: "Classifier", workers: int) -> dict[str, int]:
    """Bytes a worker needs, by what for. Weights are fp32 throughout; ZeRO divides by the number of workers."""
    weights = sum(parameter.numel() for parameter in model.parameters()) * _FLOAT
    shared = [workers if job.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    forwarded = job.micro_batch * {"all": 4, "one": 2}[job.objective.turns] ** (job.objective.name == "parallel_task")
    half = job.precision in ("bf16", "fp16") or (job.precision == "auto" and job.device != "cpu" and machine.gpus() > 0)
    # What the largest steps need; evaluation keeps no activations.
    size = max([job.data.size, *(part.size for part in job.data.sizes)])
    activations = activation_bytes(model, size) * forwarded
    # ZeRO keeps a flat copy of its share of the weights beside them.
    copies = weights // workers if job.zero_stage else 0
    return {
        "weights": weights // shared[2] + copies,
        "gradients": weights // shared[1],
        "gradient exchange": weights if workers > 1 else 0,
        "optimizer": weights * _STATES[job.optimizer.name] // shared[0],
        "moving average": weights if job.ema else 0,
        "activations": activations // 2 if half else activations,
        "batches": (job.data.prefetch + 2) * job.micro_batch * 3 * max(size, job.data.eval_size or 0) ** 2 * _FLOAT,
        "libraries": _PROCESS_BYTES,
    }


def sparkline(values: tuple[float, ...]) -> str:
    """Values as a row of bars from 0 to their maximum."""
    top = max(values, default=0.0) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int(value / top * len(_BARS)))] for value in values)


def show(found: Findings, console: Console) -> None:
    """Print the findings."""
    job = found.job
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _lines(found):
        table.add_row(label, text)
    console.print(f"{job.name}: {job.objective.name}, pretext {job.pretext.name}", markup=False, style="bold")
    console.print(table, markup=False, highlight=False)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    for reason in found.missing:
        console.print(f"missing: {reason}", style="red", markup=False, highlight=False)


def _lines(found: Findings) -> list[tuple[str, str]]:
    job, plan = found.job, found.plan
    lines = [
        (f"data {split.name}", f"{split.samples:,} samples, {split.classes} classes; {split.note}")
        for split in found.splits
    ]
    head = f", {found.pretext_parameters:,} of them in the pretext head" if found.pretext_parameters else ""
    assumed = "" if found.splits else " (assumed)"
    lines.append(("input", _input(job)))
    if job.data.augment:
        lines.append(("augmented by", ", then ".join(_augmentation(part) for part in job.data.augment)))
    batch = f"{found.workers} workers x micro-batch {job.micro_batch} x accumulation {found.accumulation}"
    lines += [
        ("model", f"{job.model.name}, {found.classes} classes{assumed}, {found.parameters:,} parameters{head}"),
        ("global batch", f"{job.global_batch} = {batch}"),
    ]
    if plan is not None:
        per_epoch = plan.samples_per_epoch / job.global_batch
        shape = f"{job.schedule.name}, {job.optimizer.name}, peak {job.optimizer.lr:g}"
        lines += [
            (
                "steps",
                f"{plan.total_steps:,} ({job.duration}; {per_epoch:,.1f} an epoch of {plan.samples_per_epoch:,})",
            ),
            ("evaluations", f"{plan.evaluations}, every {job.evaluate_every}"),
            ("learning rate", f"{sparkline(plan.rates)}  {shape}"),
        ]
        if saves := _saves(job, plan):
            kept = f"the last {job.checkpoint.keep_last} and the best stay"
            lines.append(("checkpoints", f"{saves}; {kept}"))
    parts = ", ".join(f"{name} {shown_bytes(size)}" for name, size in found.memory.items() if size)
    stored = (
        f"about {shown_bytes(found.storage_bytes)} in {job.folder}, {shown_bytes(found.checkpoint_bytes)} a checkpoint"
    )
    lines += [
        ("memory a worker", f"about {shown_bytes(sum(found.memory.values()))}: {parts}"),
        ("storage", f"{stored}; {shown_bytes(found.free_bytes)} free"),
        ("registered as", job.model_name or "not registered"),
    ]
    return lines


def _saves(job: JobConfig, plan: Plan) -> str:
    """When it saves, by count and by the clock; empty if never before the end."""
    minutes = job.checkpoint.every_minutes
    scheduled = f"{plan.checkpoints}, every {job.checkpoint.every}" if plan.checkpoints else ""
    timed = "" if minutes is None else f"{minutes:g} minute{'' if minutes == 1 else 's'} after the last one"
    return f"{scheduled}, and {timed}" if scheduled and timed else scheduled or timed


def _input(job: JobConfig) -> str:
    """Sides of the network's input over the training, and what differs in evaluation."""
    parts = [f"{part.size} until {part.until}" for part in job.data.sizes]
    text = ", ".join([*parts, f"then {job.data.size}" if parts else f"{job.data.size}"]) + " pixels a side"
    if job.data.eval_size not in (None, job.data.size):
        text += f"; evaluation at {job.data.eval_size}"
    if job.data.repeats > 1:
        text += f"; each image {job.data.repeats} times in a row, augmented anew"
    return text


def _augmentation(part: AugmentConfig) -> str:
    options = ", ".join(f"{name} {value}" for name, value in part.options.items())
    return f"{part.name} ({options})" if options else part.name


def _splits(job: JobConfig) -> tuple[tuple[Split, ...], tuple[str, ...]]:
    splits, missing = [], []
    for name in (job.data.train_split, job.data.eval_split):
        try:
            splits.append(_split(job, name))
        except DataError as error:
            missing.append(str(error))
    return tuple(splits), tuple(dict.fromkeys(missing))


def _split(job: JobConfig, name: str) -> Split:
    known = datasets.options(job.data.name) | job.data.options
    if (samples := known.get(f"{name}_count")) is not None:
        # Such a data set is made when it is first asked for, and nothing is to be started here.
        return Split(name, samples, known["classes"], f"in {job.data.root}, drawn if they are not there yet")
    use_cache(job)
    manifest = datasets.load(job.data.name, job.data.root, name, **job.data.options)
    return Split(name, len(manifest), len(manifest.classes), f"in {job.data.root}")


def _existing(path: Path) -> Path:
    with contextlib.suppress(StopIteration):
        return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return Path()


def _warnings(job: JobConfig, workers: int, memory: int, storage: int, free: int) -> list[str]:
    found = []
    if job.device != "cuda" and not machine.gpus():
        total = memory * workers
        if total > machine.memory_bytes():
            found.append(
                f"{workers} workers need about {shown_bytes(total)} of memory, this machine has "
                f"{shown_bytes(machine.memory_bytes())}; a smaller micro_batch needs less"
            )
        if workers > machine.cores():
            found.append(f"{workers} workers share {machine.cores()} CPU cores")
        if job.device == "cpu" and job.precision in ("bf16", "fp16"):
            found.append(
                f"{job.precision} convolutions on a CPU are many times slower than fp32; precision=auto avoids them"
            )
    if storage > free:
        found.append(f"the disk of {job.folder} has {shown_bytes(free)} left, checkpoints need {shown_bytes(storage)}")
    return found
