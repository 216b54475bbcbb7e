"""The configuration of a detector's training on a registered classifier: `lorot detect`, `lorot segment`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from service import config_file, provenance
from service.config_fields import Root, Section
from service.data_config import SplitsConfig
from service.errors import ConfigError
from service.training_config import TrainingConfig

# What a job begins with, key by key. The schedule that detection calls 1x (https://arxiv.org/abs/1708.02002, section
# 4.1, in epochs): SGD with plain momentum at 0.01 for 16 images, divided by 10 after 8 and 11 of 12 epochs.
_BOTH: dict[str, Any] = {
    "duration": "12 epochs",
    "global_batch": 16,
    "micro_batch": 2,
    "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4},
    "schedule": {"name": "step", "warmup": "500 steps", "milestones": ["8 epochs", "11 epochs"], "gamma": 0.1},
    "registry": {"metric": "val/AP", "mode": "max"},
}
DEFAULTS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "detect": _BOTH | {"model": {"name": "retinanet"}},
        # A sum over all grids now and then has a huge gradient, which its authors clip.
        "segment": _BOTH | {"model": {"name": "solov2"}, "clip_norm": 35.0},
    }
)
# What a detector's job is measured by, and what each finds.
FINDS = MappingProxyType({"retinanet": "detect", "solov2": "segment"})
# Keys that say where and how a job runs, not what comes out of it.
_ASIDE = (
    *("name", "output", "workers", "device", "deterministic", "on_nonfinite", "nonfinite_limit", "grace_s"),
    *("timeout_s", "log_samples", "checkpoint", "tracking", "registry", "deepspeed", "zero_stage", "evaluate_every"),
)
_ASIDE_OF_DATA = (
    *("root", "num_threads", "prefetch", "read_threads", "readahead_mb", "read_timeout_s"),
    *("cache_folder", "cache_gb"),
)


class InstanceDataConfig(SplitsConfig):
    """Which images with objects, and how they become a detector's input; normalised as the backbone's were."""

    name: str = Field("coco", description="data set with boxes, and with masks for job: segment")
    root: Root = Field(Path("data/coco"), description="folder that holds it")
    short_sides: tuple[int, ...] = Field(
        (800,), min_length=1, description="an image's short side, pixels; training draws one, evaluation has the last"
    )
    long_side: int = Field(1333, ge=32, description="the long side is made no longer than this, pixels")

    @field_validator("short_sides")
    @classmethod
    def _sides_are_sides(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        if any(side < 32 for side in sides):
            raise ValueError("a side has 32 pixels at least, one cell of the coarsest maps of the backbone")
        return sides


class DetectorConfig(Section):
    """The detector."""

    name: Literal["retinanet", "solov2"] = Field(
        "retinanet", description="retinanet: boxes (job: detect); solov2: masks (job: segment)"
    )
    backbone: str | None = Field(
        None, description="registered classifier that it begins with: models:/NAME@ALIAS, runs:/..., or a file"
    )
    options: dict[str, Any] = Field({}, description="its own options, as service/models/detectors.py has them")


class DetectionConfig(TrainingConfig):
    """A training job of a detector. What is not given is the 1x schedule; see configs/downstream."""

    job: Literal["detect", "segment"] = Field("detect", description="what is found: boxes, or masks")
    data: InstanceDataConfig = InstanceDataConfig()
    model: DetectorConfig = DetectorConfig()

    @model_validator(mode="before")
    @classmethod
    def _begin_with_the_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return config_file.merge(DEFAULTS.get(str(values.get("job", "detect")), {}), values)

    @property
    def input_varies(self) -> bool:
        """Photographs keep their shape."""
        return True

    @property
    def digest(self) -> str:
        """SHA-256 of all that the result follows from besides the backbone's weights and the data."""
        values = self.model_dump(mode="json", exclude=set(_ASIDE))
        for key in _ASIDE_OF_DATA:
            del values["data"][key]
        del values["model"]["backbone"]
        return provenance.digest(values)


def check_schedule(config: DetectionConfig, total: int, samples: int) -> None:
    """Raises ConfigError if the run ends before its learning rate has risen, or before it falls as it is told to.

    That is known only when the data are: the 1x schedule counts in epochs, and its warm-up in steps.

    Args:
        total: steps of the run.
        samples: of an epoch.
    """
    schedule = config.schedule
    sizes = {"samples_per_epoch": samples, "global_batch": config.global_batch, "total_steps": total}
    problems = []
    warmup = schedule.warmup.steps(**sizes)
    if warmup >= total:
        problems.append(
            f"schedule.warmup: '{schedule.warmup}' ends at step {warmup} of {total}, so the rate never gets where it "
            f"is to go; schedule.warmup='{total // 20} steps' would do"
        )
    milestones = [milestone.steps(**sizes) for milestone in schedule.milestones] if schedule.name == "step" else []
    if late := [step for step in milestones if step >= total]:
        told = ", ".join(f"'{milestone}'" for milestone in schedule.milestones)
        # As in the 1x schedule, which falls after 8 and 11 of 12 epochs.
        works = f"schedule.milestones='[{max(1, 2 * total // 3)} steps, {11 * total // 12} steps]'"
        problems.append(
            f"schedule.milestones: of {told} the rate falls at step {', '.join(map(str, late))} of {total} only, "
            f"which is never; {works if total > 2 else 'schedule.name=linear'} would do"
        )
    if problems:
        raise ConfigError(f"duration: '{config.duration}' is {total} steps here:\n  " + "\n  ".join(problems))


def contradictions(config: DetectionConfig) -> Iterator[str]:
    """What no single key can tell."""
    if FINDS[config.model.name] != config.job:
        fits = next(name for name, job in FINDS.items() if job == config.job)
        yield f"model.name: {config.model.name!r} is for job: {FINDS[config.model.name]}; {config.job} has {fits!r}"
    if config.model.backbone is None:
        yield "model.backbone: missing; which classifier is to begin with? models:/NAME@ALIAS, as `lorot models` lists"
    if config.data.long_side < max(config.data.short_sides):
        yield (
            f"data.long_side: {config.data.long_side} is less than the short side may be, "
            f"{max(config.data.short_sides)}; 1333 goes with 800"
        )
