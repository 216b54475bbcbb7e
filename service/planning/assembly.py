"""From a configuration and a wish for machines to a plan: gathers the facts, and notes what had to be assumed."""

import math
from dataclasses import dataclass, field

import numpy as np

from pipelines import datasets
from pipelines.manifest import Manifest
from service import check, machine
from service.config import JobConfig
from service.errors import ConfigError, DataError
from service.planning import hardware, network, prediction
from service.planning.network import Network
from service.planning.prediction import Machines, Step
from service.splits import use_cache
from service.training.lengths import Lengths, sizes

# Assumed of a data set that is not there: ImageNet's training and validation images, and its 150 GB over them
# (J. Simon, "ImageNet - part 1", 2017).
_SAMPLES, _EVAL_SAMPLES, _BYTES = 1_281_167, 50_000, 113_000
# CPU time of decoding, cropping and normalising one image of about 500 x 375 pixels, or one prepared to a short side of
# 256: the README's table of loaders, 574 and 898 images per CPU-second.
_CORE_S = {"prepared": 1 / 898, "other": 1 / 574}
# 100 Gbit/s, and NVLink by the GPU; all in bytes/s.
_NETWORK = 12.5e9
_HOST_LINK = 10e9
_LOOKED_AT = 512
_GIGA = 1e9


@dataclass(frozen=True)
class Wish:
    """What is planned for, as the command's options say; None where an assumption has to do.

    Attributes:
        gpus: workers of each node. On a plan for CPUs these are processes.
        gpu: a name in `hardware.GPUS`.
        tflops: TFLOP/s that one GPU sustains in training this network.
        images_per_s: what one GPU trains in this configuration at `data.size`.
        interconnect, network: GB/s between the GPUs of a node, in one direction, and of each node to the others.
        cores: of each node, for loading.
        samples: of the training set, if it is not there.
    """

    gpus: int = 1
    nodes: int = 1
    gpu: str | None = None
    tflops: float | None = None
    images_per_s: float | None = None
    interconnect: float | None = None
    network: float | None = None
    cores: int | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Measured:
    """What `calibration` found on this machine, for workers like those that are planned.

    Attributes:
        device: "cpu" or "cuda".
        images_per_s: what one worker trains by itself, images of the batch.
        core_s: CPU time of loading an image; on a CPU, of all that training on it takes.
        cores: of this machine.
        link: bytes/s between two of its workers; 0 if that could not be measured.
    """

    device: str
    images_per_s: float
    core_s: float
    cores: int
    link: float


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        steps: (side of the input, optimizer steps, one step of them), in order.
        forwarded: images that pass through the network for each of the batch.
        train_s, evaluate_s: of the whole run.
        memory: bytes a GPU needs, by what for.
        data_bytes: of the training set, and read per second.
        averaged_bytes: that each worker sends in a step; `network_bytes_per_s` what each node sends.
        loading_cores: CPU cores that loading keeps busy, over all nodes.
    """

    job: JobConfig
    wish: Wish
    device: str
    precision: str
    accumulation: int
    network: Network
    forwarded: int
    steps: tuple[tuple[int, int, Step], ...]
    samples: int
    train_s: float
    evaluations: int
    evaluate_s: float
    memory: dict[str, int]
    memory_limit: float
    checkpoint_bytes: int
    storage_bytes: int
    checkpoints: int
    data_bytes: float
    read_bytes_per_s: float
    averaged_bytes: float
    network_bytes_per_s: float
    loading_cores: float
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def world(self) -> int:
        return self.wish.gpus * self.wish.nodes

    @property
    def last(self) -> Step:
        """The step at the size that training ends with."""
        return self.steps[-1][2]

    @property
    def total_s(self) -> float:
        return self.train_s + self.evaluate_s


def assemble(job: JobConfig, wish: Wish, measured: Measured | None = None) -> Plan:
    """Work the plan out.

    Raises:
        ConfigError: nothing says how fast the machines are; a number is impossible; the batch cannot be shared by so
            many workers (with the numbers that can).
    """
    _refuse_nonsense(wish)
    gpu = hardware.find(wish.gpu) if wish.gpu else None
    device = measured.device if measured is not None else "cuda"
    precision = (
        "fp32" if device == "cpu" else job.precision if gpu is None else hardware.precision_on(gpu, job.precision)
    )
    precision = "bf16" if precision == "auto" else precision
    job = job.model_copy(update={"device": device, "precision": precision})
    world = wish.gpus * wish.nodes
    notes: list[str] = []
    found = check.examine(job, world)
    samples, evaluated, mean_bytes = _data(job, found, wish, notes)
    pretext_labels = check.num_pretext_labels(job)
    lengths = Lengths.of(job, samples)
    spans = _spans(sizes(job, lengths.samples) or ((0, job.data.size),), lengths.total)
    networks = {
        size: network.count(job.model, found.classes, pretext_labels, size) for size in {job.data.size, *dict(spans)}
    }
    machines = _machines(job, wish, gpu, measured, networks, notes)
    if wish.cores is None and measured is None:
        notes.append("as many CPU cores for loading as it takes; --cores N plans for N in each node")
    steps = tuple(
        (size, count, prediction.step(job, networks[size], machines, found.accumulation, size)) for size, count in spans
    )
    evaluations = math.ceil(lengths.total / lengths.evaluate)
    eval_size = job.data.eval_size or job.data.size
    scale = (eval_size / job.data.size) ** 2
    one = prediction.evaluation_seconds(networks[job.data.size], machines, job.data.size, evaluated) * scale
    memory = {name: size for name, size in found.memory.items() if device == "cpu" or name != "libraries"}
    last = steps[-1][2]
    volume = prediction.averaged_bytes(job, networks[spans[-1][0]], world, found.accumulation)
    notes += _notes(machines)
    limit = gpu.memory_gb * _GIGA if gpu else machine.memory_bytes() / wish.gpus if device == "cpu" else 0.0
    return Plan(
        job=job,
        wish=wish,
        device=device,
        precision=precision,
        accumulation=found.accumulation,
        network=networks[spans[-1][0]],
        forwarded=prediction.forwarded_images(job, 1),
        steps=steps,
        samples=lengths.samples,
        train_s=sum(count * part.seconds for _, count, part in steps),
        evaluations=evaluations,
        evaluate_s=evaluations * one,
        memory=memory,
        memory_limit=limit,
        checkpoint_bytes=found.checkpoint_bytes,
        storage_bytes=found.storage_bytes,
        checkpoints=math.ceil(lengths.total / lengths.save) if lengths.save else 0,
        data_bytes=mean_bytes * samples,
        read_bytes_per_s=mean_bytes * last.images_per_s / job.data.repeats,
        averaged_bytes=volume,
        # A ring enters and leaves each node once, whatever the number of its workers.
        network_bytes_per_s=volume / last.seconds if wish.nodes > 1 else 0.0,
        loading_cores=last.images_per_s * machines.core_s_per_image,
        assumptions=tuple(notes),
        warnings=tuple(_warnings(memory, limit, steps)),
    )


def _refuse_nonsense(wish: Wish) -> None:
    for name in ("gpus", "nodes", "tflops", "images_per_s", "interconnect", "network", "cores", "samples"):
        value = getattr(wish, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: write a number above 0")
    if sum(value is not None for value in (wish.tflops, wish.images_per_s)) > 1:
        raise ConfigError("--flops and --images-per-s say the same thing: give one of them")


def _spans(starts: tuple[tuple[int, int], ...], total: int) -> list[tuple[int, int]]:
    """(size, steps) of the parts of a run of `total` steps, of which each starts where it says."""
    ends = [start for start, _ in starts[1:]] + [total]
    spans = [(size, min(end, total) - start) for (start, size), end in zip(starts, ends, strict=True) if start < total]
    return [(size, count) for size, count in spans if count > 0]


def _data(job: JobConfig, found: check.Findings, wish: Wish, notes: list[str]) -> tuple[int, int, float]:
    """(training samples, evaluated samples, bytes of a sample)."""
    if found.missing:
        notes.append(
            f"data: {found.missing[0]}; assumed are {wish.samples or _SAMPLES:,} training images (--samples), "
            f"{_EVAL_SAMPLES:,} for evaluation and {_BYTES:,} bytes each, as in ImageNet"
        )
        return wish.samples or _SAMPLES, _EVAL_SAMPLES, _BYTES
    train, evaluated = (split.samples for split in found.splits)
    mean = None
    if datasets.options(job.data.name).get("train_count") is None:
        use_cache(job)
        mean = _mean_bytes(datasets.load(job.data.name, job.data.root, job.data.train_split, **job.data.options))
    if mean is None:
        notes.append(f"{_BYTES:,} bytes an image, as in ImageNet: the files' own sizes are not known here")
    return wish.samples or train, evaluated, mean or _BYTES


def _mean_bytes(manifest: Manifest) -> float | None:
    """Bytes of a stored sample: exact where the manifest says them, else of some of its files; None if out of reach."""
    if not manifest.encoded:
        return 3 * float(np.mean(manifest.heights.astype(float) * manifest.widths))
    if manifest.sizes is not None:
        return float(np.mean(manifest.sizes))
    if "://" in str(manifest.root):
        return None
    some = np.unique(np.linspace(0, len(manifest) - 1, _LOOKED_AT).astype(int))
    try:
        return float(np.mean([len(manifest.files.read(manifest.location(sample)[0])) for sample in some.tolist()]))
    except DataError:
        return None


def _machines(
    job: JobConfig,
    wish: Wish,
    gpu: hardware.Gpu | None,
    measured: Measured | None,
    networks: dict[int, Network],
    notes: list[str],
) -> Machines:
    half, forwarded = job.precision != "fp32", prediction.forwarded_images(job, 1)
    here = networks[job.data.size]
    memory = gpu.memory_gb_per_s * _GIGA * hardware.MEMORY_SHARE if gpu is not None else math.inf
    if wish.images_per_s is not None or (wish.tflops is None and measured is not None):
        given = wish.images_per_s
        if given is None:
            assert measured is not None
            given = _shared_rate(measured, wish.gpus)
        own = given * forwarded
        rates = {size: own * here.training_flops / counted.training_flops for size, counted in networks.items()}
        memory = math.inf
        how = "as given" if wish.images_per_s is not None else "as measured on this machine"
        notes.append(
            f"speed: {given:,.1f} images/s a worker at {job.data.size} pixels, {how}; other sizes by operations"
        )
    elif wish.tflops is not None:
        rates = {size: wish.tflops * 1e12 / counted.training_flops for size, counted in networks.items()}
        notes.append(f"speed: {wish.tflops:g} TFLOP/s sustained a GPU, as given")
    elif gpu is not None:
        rates = {
            size: 1 / hardware.seconds(gpu, half, counted.training_flops, counted.traffic)
            for size, counted in networks.items()
        }
        notes.append(
            f"speed: {gpu.name}, the slower of {hardware.COMPUTE_SHARE:.0%} of {gpu.half if half else gpu.single:g} "
            f"TFLOP/s and {hardware.MEMORY_SHARE:.0%} of {gpu.memory_gb_per_s:g} GB/s; within a factor of "
            f"{hardware.WITHIN} of NVIDIA's published ResNet-50 rates (service/planning/hardware.py). Tiny inputs or "
            "micro-batches, and deterministic mode, are slower"
        )
    else:
        raise ConfigError(
            f"what is to compute? --gpu {'|'.join(hardware.GPUS)}, or a GPU's own rate as --images-per-s N or "
            "--flops TFLOP/s, or --measure for machines like this one"
        )
    on_cpu = measured is not None and measured.device == "cpu"
    link = wish.interconnect * _GIGA if wish.interconnect else measured.link if measured is not None else 0.0
    if not link:
        link = gpu.link_gb_per_s * _GIGA if gpu is not None else _HOST_LINK
        if wish.gpus > 1:
            what = "NVLink" if gpu is not None else "PCI Express, assumed"
            notes.append(f"between the GPUs of a node: {link / _GIGA:g} GB/s in one direction ({what}; --interconnect)")
    network_bytes = wish.network * _GIGA if wish.network else _NETWORK
    if wish.nodes > 1 and not wish.network:
        notes.append(f"between nodes: {network_bytes / _GIGA:g} GB/s, 100 Gbit/s Ethernet (--network)")
    if measured is not None and not on_cpu:
        core_s = measured.core_s
        notes.append(f"loading: {core_s * 1e3:.2f} ms of CPU time an image, as measured on this machine")
    elif on_cpu:
        # Loading is in the measured rate already.
        core_s = 0.0
    else:
        core_s = _CORE_S["prepared" if job.data.name == "prepared" else "other"]
        notes.append(
            f"loading: {core_s * 1e3:.2f} ms of CPU time an image, measured on a Xeon for images of "
            f"{'a short side of 256' if job.data.name == 'prepared' else '500 x 375'} pixels; --measure measures here"
        )
    return Machines(
        gpus=wish.gpus,
        nodes=wish.nodes,
        forwarded_per_s=rates,
        interconnect=link,
        network=network_bytes,
        memory_bytes_per_s=memory,
        hides=not on_cpu,
        core_s_per_image=core_s,
        cores=wish.cores or 0,
    )


def _shared_rate(measured: Measured, workers: int) -> float:
    """Images/s of each of `workers` on a machine like this: on a CPU they share its cores."""
    if measured.device != "cpu":
        return measured.images_per_s
    return min(measured.images_per_s, measured.cores / measured.core_s / workers)


def _notes(machines: Machines) -> list[str]:
    notes = []
    if machines.world > 1:
        beside = (
            "hidden behind the last backward pass but for the last bucket" if machines.hides else "hidden by nothing"
        )
        notes.append(
            "gradients: ring all-reduce of float32, 2 (W - 1) / W of their bytes, at "
            f"{prediction.LINK_SHARE:.0%} of the slowest link; {beside}"
        )
    notes.append("storage keeps up, checkpoints are written beside the training, and nothing fails")
    return notes


def _warnings(memory: dict[str, int], limit: float, steps: tuple[tuple[int, int, Step], ...]) -> list[str]:
    found = []
    if limit and sum(memory.values()) > limit:
        found.append(
            f"a worker needs about {sum(memory.values()) / _GIGA:.1f} GB and has {limit / _GIGA:.0f} GB; a smaller "
            "micro_batch needs less"
        )
    last = steps[-1][2]
    if last.loading > last.computing + last.exposed + last.updating:
        found.append("loading is the limit: more --cores, or prepared data (lorot data prepare), would be faster")
    return found
