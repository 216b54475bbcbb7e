"""What `lorot check` has found out about a job, and how its length, its data and its disk are looked at."""

import contextlib
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pipelines import datasets
from pipelines.amounts import shown_bytes
from service import config, detection_config, machine
from service.config import DetectionConfig, JobConfig, TrainingConfig
from service.errors import DataError
from service.jobs.local import num_workers
from service.splits import use_cache
from service.training.lengths import Lengths, sizes
from service.training.schedule import learning_rate

J = TypeVar("J", bound=TrainingConfig, covariant=True)
K = TypeVar("K", bound=TrainingConfig)

FLOAT = 4
# Tensors as large as a weight that an optimizer keeps of it.
STATES = {"sgd": 1, "adamw": 2, "lamb": 2}
# Of a worker that has loaded torch, DALI, DeepSpeed and MLflow: the quickstart's peak at 1.10 GB each on a CPU, 0.05 GB
# of it by what is counted below.
PROCESS_BYTES = 1_050_000_000
_BARS = "▁▂▃▄▅▆▇█"
_POINTS = 48


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
class Outline(Generic[J]):
    """What can be said of a job without its network, so without torch.

    Attributes:
        workers, accumulation: processes, and micro-batches each adds up per step.
        splits: those that are there; missing: why the others, or a detector's trunk, are not.
        plan: None while the data is missing.
        trunk: of a detector: what it begins with, for people.
        free_bytes: what the disk has left.
        warnings: what would run, but badly.
    """

    job: J
    workers: int
    accumulation: int
    splits: tuple[Split, ...]
    missing: tuple[str, ...]
    plan: Plan | None
    trunk: str
    free_bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Findings(Outline[J]):
    """What `examine` found out: the outline, and what the network takes.

    Attributes:
        classes, parameters, pretext_parameters, trained_parameters: of the network.
        memory: bytes a worker needs, by what for. A rough estimate.
        checkpoint_bytes, storage_bytes: one checkpoint; all that are kept at once.
    """

    classes: int
    parameters: int
    pretext_parameters: int
    trained_parameters: int
    memory: dict[str, int]
    checkpoint_bytes: int
    storage_bytes: int


def outline(job: K, workers: int | None = None, *, trunk: str = "", absent: tuple[str, ...] = ()) -> Outline[K]:
    """What is known of `job` on `workers` processes of this machine before its network is built.

    Args:
        trunk: of a detector, for people; absent: why it is not there.

    Raises:
        ConfigError: as training would.
    """
    count = num_workers(job, workers)
    accumulation = config.accumulation_steps(job, count)
    found, missing = splits(job)
    return Outline(
        job=job,
        workers=count,
        accumulation=accumulation,
        splits=found,
        missing=(*missing, *absent),
        plan=plan(job, found[0].samples) if not missing else None,
        trunk=trunk,
        free_bytes=free_bytes(job),
        warnings=tuple(_of_this_machine(job, count)),
    )


def completed(known: Outline[K], storage: int, memory: dict[str, int], **network: int) -> Findings[K]:
    """The outline with what its network takes; `network`: the numbers of `Findings`."""
    own = vars(known) | network | {"storage_bytes": storage, "memory": memory}
    told = _of_amounts(known, sum(memory.values()), storage)
    return Findings(**(own | {"warnings": (*told, *known.warnings)}))


def plan(job: TrainingConfig, samples: int) -> Plan:
    """Steps, evaluations, checkpoints and learning rates of a run on a training set of `samples`.

    Raises:
        ConfigError: what training would raise, once it knows how long an epoch is.
    """
    lengths = Lengths.of(job, samples)
    total = lengths.total
    if isinstance(job, JobConfig):
        sizes(job, lengths.samples)
    elif isinstance(job, DetectionConfig):
        detection_config.check_schedule(job, total, lengths.samples)
    at = sorted({round(point * (total - 1) / (_POINTS - 1)) for point in range(_POINTS)})
    rates = tuple(
        learning_rate(job.schedule, job.optimizer.lr, step, total, lengths.samples, job.global_batch) for step in at
    )
    saves = math.ceil(total / lengths.save) if lengths.save else 0
    return Plan(lengths.samples, total, math.ceil(total / lengths.evaluate), saves, rates)


def sparkline(values: tuple[float, ...]) -> str:
    """Values as a row of bars from 0 to their maximum."""
    top = max(values, default=0.0) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int(value / top * len(_BARS)))] for value in values)


def memory(
    job: TrainingConfig, workers: int, *, weights: int, trained: int, activations: int, batch: int
) -> dict[str, int]:
    """Bytes a worker needs, by what for. Weights are fp32 throughout; ZeRO divides by the number of workers.

    Args:
        weights: bytes of all of them; trained: of those that learn.
        activations: bytes in fp32 that a micro-batch keeps for the backward pass.
        batch: bytes of a micro-batch's images.
    """
    shared = [workers if job.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    # ZeRO keeps a flat copy of its share of the weights beside them.
    copies = weights // workers if job.zero_stage else 0
    return {
        "weights": weights // shared[2] + copies,
        "gradients": trained // shared[1],
        "gradient exchange": trained if workers > 1 else 0,
        "optimizer": trained * STATES[job.optimizer.name] // shared[0],
        "moving average": weights if job.ema else 0,
        "activations": activations // 2 if is_half(job) else activations,
        "batches": (job.data.prefetch + 2) * batch,
        "libraries": PROCESS_BYTES,
    }


def splits(job: TrainingConfig) -> tuple[tuple[Split, ...], tuple[str, ...]]:
    """The training and the evaluation split, those that are there, and why the others are not."""
    found, missing = [], []
    for name in (job.data.train_split, job.data.eval_split):
        try:
            found.append(_split(job, name))
        except DataError as error:
            missing.append(str(error))
    return tuple(found), tuple(dict.fromkeys(missing))


def _split(job: TrainingConfig, name: str) -> Split:
    known = datasets.options(job.data.name) | job.data.options
    if (samples := known.get(f"{name}_count")) is not None:
        # Such a data set is made when it is first asked for, and nothing is to be started here.
        return Split(name, samples, known["classes"], f"in {job.data.root}, drawn if they are not there yet")
    use_cache(job)
    manifest = datasets.load(job.data.name, job.data.root, name, **job.data.options)
    # Of images with objects, those that there is something to learn from.
    learnable = manifest.heading.num_trainable if name == job.data.train_split else None
    count = len(manifest) if learnable is None else learnable
    note = f", of {len(manifest):,} images" if count != len(manifest) else ""
    return Split(name, count, len(manifest.classes), f"in {job.data.root}{note}")


def free_bytes(job: TrainingConfig) -> int:
    """What the disk of the run's folder has left."""
    return shutil.disk_usage(_existing(job.folder)).free


def is_half(job: TrainingConfig) -> bool:
    """Whether activations are 16 bits wide on this machine."""
    on_gpu = job.precision == "auto" and job.device != "cpu" and machine.gpus() > 0
    return job.precision in ("bf16", "fp16") or on_gpu


def _existing(path: Path) -> Path:
    with contextlib.suppress(StopIteration):
        return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return Path()


def _on_cpu(job: TrainingConfig) -> bool:
    return job.device != "cuda" and not machine.gpus()


def _of_this_machine(job: TrainingConfig, workers: int) -> Iterator[str]:
    if _on_cpu(job) and workers > machine.cores():
        yield f"{workers} workers share {machine.cores()} CPU cores"
    if _on_cpu(job) and job.device == "cpu" and job.precision in ("bf16", "fp16"):
        yield f"{job.precision} convolutions on a CPU are many times slower than fp32; precision=auto avoids them"


def _of_amounts(known: Outline[TrainingConfig], memory: int, storage: int) -> Iterator[str]:
    job, total = known.job, memory * known.workers
    if _on_cpu(job) and total > machine.memory_bytes():
        yield (
            f"{known.workers} workers need about {shown_bytes(total)} of memory, this machine has "
            f"{shown_bytes(machine.memory_bytes())}; a smaller micro_batch needs less"
        )
    if storage > known.free_bytes:
        left = shown_bytes(known.free_bytes)
        yield f"the disk of {job.folder} has {left} left, checkpoints need {shown_bytes(storage)}"
