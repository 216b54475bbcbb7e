"""A job's configuration: YAML plus dotted overrides, checked before anything starts. Imports no torch."""

import difflib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from pipelines import datasets, pretext
from service.duration import Duration
from service.errors import ConfigError


def _duration(value: Any) -> Duration:
    return value if isinstance(value, Duration) else Duration.parse(value)


Length = Annotated[Duration, BeforeValidator(_duration), PlainSerializer(str)]


class Section(BaseModel):
    """One block of the configuration. Unknown keys are errors; values do not change after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, validate_default=True)


class DataConfig(Section):
    """Which images, and how they become the network's input."""

    name: str = Field("demo", description="data set: " + ", ".join(datasets.available()))
    root: Path = Field(Path("data/demo"), description="folder that holds it")
    options: dict[str, Any] = Field({}, description="the data set's own options, as for demo: {train_count: 4000}")
    train_split: str = Field("train", description="split to train on")
    eval_split: str = Field("val", description="split to evaluate on")
    train_limit: int | None = Field(None, ge=1, description="train on this many samples only, drawn by the data seed")
    size: int = Field(224, ge=1, description="side of the network's input, pixels")
    crop: Literal["random_resized", "pad", "whole"] = Field(
        "random_resized", description="training window: random area and aspect, random shift within padding, or all"
    )
    scale: tuple[float, float] = Field((0.08, 1.0), description="random_resized: share of the area, from and to")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="random_resized: width to height, from and to")
    padding: int = Field(4, ge=0, description="pad: zeros around the image before the window is drawn, pixels")
    flip: bool = Field(True, description="mirror half of the training images")
    eval_crop: float = Field(0.875, gt=0, le=1, description="evaluation window: centre, this share of the short side")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="subtracted, per channel, of 0 to 1")
    std: tuple[float, float, float] = Field((0.229, 0.224, 0.225), description="divided by, per channel, of 0 to 1")
    loader: Literal["dali", "torch"] = Field("dali", description="dali, or the plain torch reference of the same plan")
    num_threads: int = Field(0, ge=0, description="decoding threads a worker; 0: cores / workers")
    prefetch: int = Field(2, ge=1, description="batches prepared ahead")
    on_bad_image: Literal["error", "skip"] = Field("error", description="an unreadable image stops the run, or is left out")


class PretextConfig(Section):
    """The self-supervised task that the pipeline applies."""

    name: str = Field("none", description="pretext task: " + ", ".join(pretext.available()))
    options: dict[str, Any] = Field({}, description="its own options, as for lorot_e: {grid: 3}; lorot_i: {protocol: official}")


class ObjectiveConfig(Section):
    """What is minimised."""

    name: Literal["supervised", "multi_task", "augmentation", "parallel_task"] = Field(
        "supervised",
        description="supervised; multi_task: both losses on one input (MT); augmentation: transformed input, no pretext "
        "loss (DA); parallel_task: a separate transformed batch for the pretext loss (PT)",
    )
    pretext_weight: float = Field(0.1, ge=0, description="lambda, the weight of the pretext loss")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the class loss")
    turns: Literal["all", "one"] = Field("all", description="parallel_task: all four turns of every image, or the drawn one")


class ModelConfig(Section):
    """The network."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "cifar_resnet18", "resnet_small"] = Field(
        "resnet50", description="torchvision's ResNets, the CIFAR ResNet-18, or a small one for laptops"
    )
    width: int = Field(32, ge=8, description="resnet_small: channels of its first stage")
    init_from: str | None = Field(None, description="start from these weights: models:/NAME@ALIAS, runs:/..., or a file")


class OptimizerConfig(Section):
    """How the weights move."""

    name: Literal["sgd", "adamw", "lamb"] = Field("sgd", description="sgd has Nesterov momentum")
    lr: float = Field(0.1, gt=0, description="peak learning rate, for the whole global batch")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd")
    betas: tuple[float, float] = Field((0.9, 0.999), description="adamw, lamb")
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

    every: Length | None = Field(Duration.parse("1 epochs"), description="save after this much training")
    every_minutes: float | None = Field(None, gt=0, description="and whenever this long has passed since the last save")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept; the best is kept besides")


class TrackingConfig(Section):
    """Where runs are recorded."""

    uri: str | None = Field(None, description="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite in mlruns/")
    experiment: str = Field("lorot", description="MLflow experiment")
    log_every: Length = Field(Duration.parse("20 steps"), description="between two records of training metrics")
    system_metrics: bool = Field(True, description="record CPU, memory, disk and GPU load")


class RegistryConfig(Section):
    """Under which name the trained model is registered."""

    name: str | None = Field(None, description="registered model name; default lorot-<data set>; no model with ''")
    metric: str = Field("val/top1", description="`best` moves when this metric improves")
    mode: Literal["max", "min"] = Field("max", description="what better means")


class JobConfig(Section):
    """A training job."""

    name: str = Field("train", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run and its folder")
    output: Path = Field(Path("runs"), description="folder of run folders: checkpoints, logs, report")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything that is random")
    duration: Length = Field(Duration.parse("90 epochs"), description="how long to train")
    evaluate_every: Length = Field(Duration.parse("1 epochs"), description="between two evaluations; always at the end")
    global_batch: int = Field(256, ge=1, description="samples per optimizer step, over all workers")
    micro_batch: int = Field(64, ge=1, description="samples per forward pass of one worker; the rest is accumulated")
    workers: int = Field(0, ge=0, description="processes `lorot train` starts; 0: one per GPU, one on a CPU")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs if there are any")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 on a GPU that has it, else fp32")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    clip_norm: float | None = Field(None, gt=0, description="clip the global gradient norm to this")
    channels_last: bool = Field(True, description="NHWC memory format")
    compile: bool = Field(False, description="torch.compile the network")
    sync_batchnorm: bool = Field(False, description="BatchNorm statistics over all workers (GPU only)")
    deterministic: bool = Field(False, description="deterministic kernels: bit-exact repetition, slower on a GPU")
    data: DataConfig = DataConfig()
    pretext: PretextConfig = PretextConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig | None = Field(None, description="moving average of the weights; off by default")
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()
    deepspeed: dict[str, Any] = Field({}, description="merged into DeepSpeed's own configuration; no contradictions")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.output / self.name

    @property
    def model_name(self) -> str:
        """The name its model is registered under; empty for none."""
        return f"lorot-{self.data.name}" if self.registry.name is None else self.registry.name


def load(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> JobConfig:
    """Read a YAML file (and the file its `extends:` names), apply `key.sub=value` overrides, and check all of it.

    Raises:
        ConfigError: the file is missing or no YAML mapping; a key is unknown (with the nearest one) or a value wrong.
    """
    values = read(Path(path))
    for override in overrides:
        _assign(values, override)
    return resolve(values, source=str(path))


def read(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, on top of the one its `extends:` (a path relative to the file) names."""
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: `extends` goes in a circle")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this configuration ({error.strerror}); see the ones in configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}; a configuration is a mapping of keys to values")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    return merge(read(path.parent / str(parent), (*_seen, path.resolve())), values)


def merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """`upper` on top of `lower`, mapping by mapping."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def resolve(values: dict[str, Any], source: str = "configuration") -> JobConfig:
    """Check a mapping; raises ConfigError that lists every wrong key and value."""
    try:
        config = JobConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}:\n" + "\n".join(_explain(problem) for problem in error.errors())) from None
    check_consistency(config, source)
    return config


def check_consistency(config: JobConfig, source: str = "configuration") -> None:
    """What no single key can tell; raises ConfigError."""
    problems = []
    for section, module, name in (("data", datasets, config.data.name), ("pretext", pretext, config.pretext.name)):
        if name not in module.available():
            problems.append(f"  {section}.name: {name!r} is none of {', '.join(module.available())}{_nearest(name, module.available())}")
    if config.objective.name == "supervised" and config.pretext.name != "none":
        problems.append(
            f"  objective.name: 'supervised' has no use for pretext {config.pretext.name!r}; "
            "use 'multi_task', 'augmentation' or 'parallel_task', or pretext.name=none"
        )
    if config.objective.name != "supervised" and config.pretext.name == "none":
        problems.append(f"  pretext.name: objective {config.objective.name!r} needs a pretext task; have none")
    if config.global_batch % config.micro_batch:
        fits = [n for n in range(1, config.global_batch + 1) if config.global_batch % n == 0 and n <= config.micro_batch]
        problems.append(
            f"  micro_batch: {config.micro_batch} does not divide global_batch {config.global_batch}; {fits[-1]} would"
        )
    if config.zero_stage == 3 and config.ema is not None:
        problems.append("  ema: needs whole weights on each worker; use zero_stage 0, 1 or 2")
    if problems:
        raise ConfigError(f"{source}:\n" + "\n".join(problems))


def accumulation_steps(config: JobConfig, world_size: int) -> int:
    """Micro-batches each worker adds up per optimizer step; raises ConfigError if the batch does not divide."""
    micro_batches = config.global_batch // config.micro_batch
    if micro_batches % world_size:
        fits = ", ".join(str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0)
        raise ConfigError(
            f"global_batch {config.global_batch} in micro-batches of {config.micro_batch} makes {micro_batches} of them, "
            f"which {world_size} workers cannot share evenly; numbers of workers that can: {fits}"
        )
    return micro_batches // world_size


def dump(config: JobConfig) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe(section: type[BaseModel] = JobConfig, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Rows (dotted key, type, default, meaning) of every key, for `lorot train --help`."""
    rows = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        nested = [part for part in (kind, *get_args(kind)) if isinstance(part, type) and issubclass(part, Section)]
        if nested and field.default is not None:
            rows += describe(nested[0], f"{prefix}{name}.")
            continue
        rows.append((prefix + name, _type_name(kind), str(field.default), field.description or ""))
        if nested:
            rows += describe(nested[0], f"{prefix}{name}.")
    return rows


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(str(value) for value in get_args(kind))
    if get_origin(kind) in (types.UnionType,):
        return "|".join(_type_name(part) for part in get_args(kind) if part is not type(None)) + "|null"
    if kind is Duration:
        return "duration"
    return getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else get_origin(kind).__name__


def _assign(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key.sub=value, as in optimizer.lr=0.05")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *path, last = key.split(".")
    for name in path:
        below = values.setdefault(name, {})
        if below is None:
            below = values[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {name!r} holds a value, not a block of keys")
        values = below
    values[last] = value


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_at(problem["loc"][:-1])
        return f"  {where}: unknown key{_nearest(str(problem['loc'][-1]), known) or '; known here: ' + ', '.join(known)}"
    return f"  {where}: {problem['msg'].removeprefix('Value error, ')} (given: {problem['input']!r})"


def _keys_at(path: tuple[Any, ...]) -> list[str]:
    section: Any = JobConfig
    for part in path:
        kind = section.model_fields[part].annotation
        section = next(k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, Section))
    return list(section.model_fields)


def _nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
