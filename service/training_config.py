"""What every training job's configuration holds, whatever is trained. Imports no torch."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipelines import datasets
from service.config_fields import Length, Section, Share, Span
from service.data_config import SplitsConfig
from service.duration import Duration
from service.errors import ConfigError


def _mapping(value: Any) -> Any:
    """The content of the JSON file that a text names; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"no JSON file can be read there ({error}); write a path, or the keys themselves") from None


class OptimizerConfig(Section):
    """How the weights move."""

    name: Literal["sgd", "adamw", "lamb"] = Field("sgd", description="sgd has momentum; torch's AdamW; LAMB")
    lr: float = Field(0.1, gt=0, description="peak learning rate, for the whole global batch")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd")
    nesterov: bool = Field(True, description="sgd: Nesterov's momentum, in place of the plain one")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="adamw, lamb")
    weight_decay: float = Field(1e-4, ge=0, description="on weights of convolutions and linear layers only")


class ScheduleConfig(Section):
    """The learning rate over optimizer steps."""

    name: Literal["cosine", "step", "linear", "one_cycle"] = Field("cosine", description="shape after the warm-up")
    warmup: Length = Field(Duration.parse("5 %"), description="linear rise from 0 (one_cycle: its rising part)")
    milestones: tuple[Length, ...] = Field((), description="step: when the rate is multiplied by gamma")
    gamma: float = Field(0.1, gt=0, description="step: the factor")
    final: float = Field(0.0, ge=0, description="cosine, linear, one_cycle: last rate as a share of the peak")


class EmaConfig(Section):
    """Exponential moving average of weights and buffers, used for evaluation and registered."""

    decay: float = Field(0.999, gt=0, lt=1, description="share of the old average kept at each update")
    every: int = Field(1, ge=1, description="steps between updates")


class CheckpointConfig(Section):
    """What survives a crash."""

    every: Span | None = Field(Duration.parse("1 epochs"), description="save after this much training")
    every_minutes: float | None = Field(
        1.0, gt=0, description="and whenever this long has passed since the last save; less often where saving is slow"
    )
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept; the best is kept besides")


class TrackingConfig(Section):
    """Where runs are recorded."""

    uri: str | None = Field(None, description="MLflow tracking URI; MLFLOW_TRACKING_URI, else sqlite in mlruns/")
    experiment: str = Field("lorot", description="MLflow experiment")
    log_every: Span = Field(Duration.parse("20 steps"), description="between two records of training metrics")
    system_metrics: bool = Field(True, description="record CPU, memory, disk and GPU load")


class BestConfig(Section):
    """Which checkpoint is the best."""

    metric: str = Field("val/top1", description="`best` moves when this metric improves")
    mode: Literal["max", "min"] = Field("max", description="what better means")


class TrainingConfig(Section):
    """What all training jobs have in common; `service.config` and `service.detection_config` say what is trained."""

    job: Literal["classify", "detect", "segment"] = Field(
        "classify", description="what is trained: a classifier, or a detector of boxes or masks on a registered one"
    )
    name: str = Field(
        "train",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="names the run and its folder; default: the file's name",
    )
    output: Path = Field(Path("runs"), description="folder of run folders: checkpoints, logs, report")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything that is random")
    duration: Span = Field(Duration.parse("90 epochs"), description="how long to train")
    evaluate_every: Span = Field(Duration.parse("1 epochs"), description="between two evaluations; always at the end")
    global_batch: int = Field(256, ge=1, description="samples per optimizer step, over all workers")
    micro_batch: int = Field(64, ge=1, description="samples per forward pass of one worker; the rest is accumulated")
    workers: int = Field(0, ge=0, description="processes `lorot train` starts; 0: one per GPU, one on a CPU")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if there are any")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU that has it, else fp32"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    clip_norm: float | None = Field(None, gt=0, description="clip the global gradient norm to this")
    channels_last: bool = Field(True, description="NHWC memory format")
    compile: bool = Field(False, description="torch.compile the network")
    sync_batchnorm: bool = Field(False, description="BatchNorm statistics over all workers (GPU only)")
    deterministic: bool = Field(False, description="deterministic kernels: bit-exact repetition, slower on a GPU")
    on_nonfinite: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="at a loss or gradient that is not finite - stop: end the run; skip: leave that step's update out, "
        "which waits for the GPU at every step; rewind: go back to the last checkpoint and leave it out then; "
        "with fp16 a gradient only lowers the loss scale",
    )
    nonfinite_limit: int = Field(
        10, ge=1, description="skip, rewind: steps left out at most in the whole run; one more ends it"
    )
    grace_s: float = Field(
        25.0,
        ge=3,
        description="seconds at most from a signal that stops the job (SIGTERM, SIGUSR1, Ctrl-C) to its end; the step "
        "and the checkpoint that are not done by then are lost",
    )
    timeout_s: float = Field(
        600.0,
        ge=1,
        description="seconds that a worker waits for the others, or for a batch, before it ends and says where each "
        "stood; longer than the slowest step. Up to the first batch it waits ten minutes at least for those that live",
    )
    log_samples: bool = Field(
        False,
        description="keep which samples each worker was given, a line per step, in samples-rank*.jsonl; of a step that "
        "was done again the latest attempt counts",
    )
    data: SplitsConfig = SplitsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig | None = Field(None, description="moving average of the weights; off by default")
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: BestConfig = BestConfig()
    deepspeed: Annotated[dict[str, Any], BeforeValidator(_mapping)] = Field(
        {}, description="merged into DeepSpeed's own configuration, no contradictions; or the path of its JSON file"
    )

    @property
    def input_varies(self) -> bool:
        """Whether height and width of the network's input change from batch to batch."""
        return False

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.output / self.name

    @property
    def shutdown_s(self) -> int:
        """Seconds that torchrun gives the workers after a signal; then it kills them, still within `grace_s`."""
        return int(self.grace_s - max(1.0, 0.08 * self.grace_s))

    @property
    def worker_grace_s(self) -> float:
        """Seconds that a worker takes at most after a signal; then it says so and ends, before torchrun kills it."""
        return self.shutdown_s - max(1.0, 0.08 * self.grace_s)


def contradictions(config: TrainingConfig) -> Iterator[str]:
    """What no single key can tell, of the keys that all jobs have."""
    if config.data.name not in datasets.available():
        yield f"data.name: {config.data.name!r} {none_of(config.data.name, datasets.available())}"
    elif config.data.options:
        known = tuple(datasets.options(config.data.name))
        for option in config.data.options.keys() - set(known):
            has = f"an option of data set {config.data.name!r}, which has {', '.join(known) or 'none'}"
            near = difflib.get_close_matches(str(option), known, n=1)
            yield f"data.options.{option}: is not {has}" + (f"; did you mean {near[0]!r}?" if near else "")
    if config.duration.unit == "%":
        yield f"duration: '{config.duration}' is a share of itself; write epochs, steps or samples"
    if config.global_batch % config.micro_batch:
        largest = max(
            n for n in range(1, min(config.micro_batch, config.global_batch) + 1) if config.global_batch % n == 0
        )
        yield f"micro_batch: {config.micro_batch} does not divide global_batch {config.global_batch}; {largest} would"
    if config.schedule.name == "step" and not config.schedule.milestones:
        yield "schedule.milestones: 'step' needs some, as in [30 epochs, 60 epochs]"
    if config.optimizer.name == "lamb" and config.zero_stage > 0:
        yield (
            f"zero_stage: {config.zero_stage} cuts weights into flat pieces, but lamb needs the norm of each layer; "
            "use zero_stage 0, or optimizer adamw or sgd"
        )
    if config.zero_stage == 3 and config.ema is not None:
        yield "ema: needs whole weights on each worker; use zero_stage 0, 1 or 2"
    if config.sync_batchnorm and config.device == "cpu":
        yield "sync_batchnorm: works between GPUs only; leave it off on a CPU"


def none_of(name: str, known: tuple[str, ...]) -> str:
    """The end of a sentence about a name that is none of the known ones."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"is none of {', '.join(known)}" + (f"; did you mean {near[0]!r}?" if near else "")


def accumulation_steps(config: TrainingConfig, world_size: int) -> int:
    """Micro-batches each worker adds up per optimizer step; raises ConfigError if the batch does not divide."""
    micro_batches = config.global_batch // config.micro_batch
    if micro_batches % world_size:
        fits = ", ".join(str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0)
        raise ConfigError(
            f"global_batch {config.global_batch} in micro-batches of {config.micro_batch} makes {micro_batches} of "
            f"them, which {world_size} workers cannot share evenly; numbers of workers that can: {fits}"
        )
    return micro_batches // world_size
