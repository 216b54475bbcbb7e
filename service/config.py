"""A job's configuration: YAML plus dotted overrides, checked before anything starts. Imports no torch."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import yaml
from pydantic import Field, field_validator

from pipelines import pretext
from service import config_file, detection_config
from service.config_fields import Section
from service.data_config import DataConfig, view
from service.detection_config import DetectionConfig
from service.errors import ConfigError, LorotError
from service.explaining import validated
from service.naming import is_model_name
from service.training_config import (
    BestConfig,
    CheckpointConfig,
    EmaConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
    accumulation_steps,
    contradictions,
    none_of,
)


class PretextConfig(Section):
    """The self-supervised task that the pipeline applies."""

    name: str = Field("none", description="pretext task: " + ", ".join(pretext.available()))
    options: dict[str, Any] = Field(
        {}, description="its own options, as lorot_e: {grid: 3}, lorot_i: {protocol: official}"
    )


class ObjectiveConfig(Section):
    """What is minimised."""

    name: Literal["supervised", "multi_task", "augmentation", "parallel_task"] = Field(
        "supervised",
        description="supervised; multi_task: both losses on one input (MT); augmentation: transformed input, no "
        "pretext loss (DA); parallel_task: a separate transformed batch for the pretext loss (PT)",
    )
    pretext_weight: float = Field(0.1, ge=0, description="lambda, the weight of the pretext loss")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the class loss")
    turns: Literal["all", "one"] = Field(
        "all", description="parallel_task: all four turns of an image, or the drawn one"
    )


class ModelConfig(Section):
    """The network."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "cifar_resnet18", "resnet_small"] = Field(
        "resnet50", description="torchvision's ResNets, the CIFAR ResNet-18, or a small one for laptops"
    )
    width: int = Field(32, ge=8, description="resnet_small: channels of its first stage")
    zero_init: bool = Field(False, description="start the last BatchNorm of each residual branch at 0")
    init_from: str | None = Field(None, description="weights to start from: models:/NAME@ALIAS, runs:/..., or a file")


class RegistryConfig(BestConfig):
    """Under which name the trained model is registered, and which is the best."""

    name: str | None = Field(None, description="registered model name; default lorot-<data set>; no model with ''")

    @field_validator("name")
    @classmethod
    def _name_is_legal(cls, name: str | None) -> str | None:
        # Or else it would be refused when the training is over.
        if name and not is_model_name(name):
            raise ValueError(f"{name!r}: a model's name has letters, digits, '-', '_', '.' and spaces only")
        return name


class JobConfig(TrainingConfig):
    """A training job of a classifier."""

    job: Literal["classify"] = Field("classify", description="what is trained: a classifier; `lorot detect` has others")
    data: DataConfig = DataConfig()
    pretext: PretextConfig = PretextConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    model: ModelConfig = ModelConfig()
    registry: RegistryConfig = RegistryConfig()

    @property
    def model_name(self) -> str:
        """The name its model is registered under; empty for none."""
        return f"lorot-{self.data.name}" if self.registry.name is None else self.registry.name


KINDS: dict[str, type[TrainingConfig]] = {
    "classify": JobConfig,
    "detect": DetectionConfig,
    "segment": DetectionConfig,
}


def load(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> JobConfig:
    """As `load_any`, for what knows classifiers only; raises ConfigError for another job as well."""
    return _classifying(load_any(path, overrides), str(path))


def load_any(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> TrainingConfig:
    """Read a YAML file (and the file its `extends:` names), apply `key.sub=value` overrides, and check all of it.

    Its key `job` says which keys there are: those of `JobConfig`, or of `DetectionConfig`. A configuration without a
    `name` is named after its file, so that variants of one need not name themselves.

    Raises:
        ConfigError: the file is missing or no YAML mapping; a key is unknown (with the nearest one) or a value wrong.
    """
    values = config_file.read(Path(path))
    for override in overrides:
        config_file.assign(values, override)
    values.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem).lstrip("._-") or "train")
    return resolve_any(values, source=str(path))


def resolve(values: dict[str, Any], source: str = "configuration") -> JobConfig:
    """As `resolve_any`, for a classifier; raises ConfigError for another job as well."""
    return _classifying(resolve_any(values, source), source)


def resolve_any(values: dict[str, Any], source: str = "configuration") -> TrainingConfig:
    """Check a mapping; raises ConfigError that lists every wrong key and value."""
    name = values.get("job", "classify")
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(f"{source}:\n  job: {name!r} {none_of(str(name), tuple(KINDS))}")
    config = validated(KINDS[name], values, source)
    found = [*contradictions(config)]
    if isinstance(config, JobConfig):
        found += _contradictions(config)
    elif isinstance(config, DetectionConfig):
        found += detection_config.contradictions(config)
    problems = [f"  {problem}" for problem in found]
    if problems:
        raise ConfigError(f"{source}:\n" + "\n".join(problems))
    return config


def _classifying(config: TrainingConfig, source: str) -> JobConfig:
    if not isinstance(config, JobConfig):
        raise ConfigError(
            f"{source}: job: {config.job!r} trains no classifier, and this is for classifiers only; `lorot check` "
            f"counts its steps, memory and storage, and `lorot {config.job} ... duration='20 steps'` shows its images/s"
        )
    return config


def _contradictions(config: JobConfig) -> Iterator[str]:
    """What no single key can tell, of those of a classifier."""
    if config.pretext.name not in pretext.available():
        yield f"pretext.name: {config.pretext.name!r} {none_of(config.pretext.name, pretext.available())}"
    else:
        try:
            task = pretext.load(config.pretext.name, **config.pretext.options)
            for size in sorted({config.data.size, *(part.size for part in config.data.sizes)}):
                task.sample(0, 0, np.zeros(1, np.int64), size)
        except (LorotError, TypeError) as error:
            yield f"pretext: {error}"
    try:
        view(config.data)
    except LorotError as error:
        yield f"data.augment: {error}"
    if config.objective.name == "supervised" and config.pretext.name != "none":
        yield (
            f"objective.name: 'supervised' has no use for pretext {config.pretext.name!r}; "
            "use 'multi_task', 'augmentation' or 'parallel_task', or pretext.name=none"
        )
    if config.objective.name != "supervised" and config.pretext.name == "none":
        tasks = ", ".join(name for name in pretext.available() if name != "none")
        yield f"pretext.name: objective {config.objective.name!r} needs a pretext task: {tasks}"
    if config.data.scale[1] > 1:
        yield f"data.scale: {config.data.scale[1]} is more than the whole image, which is 1"


def dump(config: TrainingConfig) -> str:
    """The resolved configuration as YAML that `load_any` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def subsection(kind: Any) -> type[Section] | None:
    """The Section class in a field's type (`EmaConfig | None` holds EmaConfig), or None; a list of them is no block."""
    return None if get_origin(kind) is tuple else _section_in(kind)


def _section_in(kind: Any) -> type[Section] | None:
    parts = (kind, *get_args(kind))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)


__all__ = [
    "KINDS",
    "CheckpointConfig",
    "DataConfig",
    "DetectionConfig",
    "EmaConfig",
    "JobConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PretextConfig",
    "RegistryConfig",
    "ScheduleConfig",
    "Section",
    "TrackingConfig",
    "TrainingConfig",
    "accumulation_steps",
    "dump",
    "load",
    "load_any",
    "resolve",
    "resolve_any",
    "subsection",
    "view",
]
