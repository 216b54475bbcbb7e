"""The part of a job's configuration that says which images are seen, and how."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipelines import augment, datasets
from pipelines.plan import View
from service.config_fields import Positive, Range, Root, Section, Span


class AugmentConfig(Section):
    """One augmentation of the training images."""

    name: str = Field(description="augmentation: " + ", ".join(augment.available()))
    options: dict[str, Any] = Field({}, description="its own options, as rand_augment: {magnitude: 7}")


class SizeConfig(Section):
    """A side of the input for a part of the training."""

    size: int = Field(ge=1, description="side of the network's input, pixels")
    until: Span = Field(description="counted from the start of the training")


class SplitsConfig(Section):
    """Which images, and how they are read."""

    name: str = Field("demo", description="data set: " + ", ".join(datasets.available()))
    root: Root = Field(Path("data/demo"), description="folder that holds it, or a URL such as s3://bucket/folder")
    options: dict[str, Any] = Field({}, description="the data set's own options, as for demo: {train_count: 4000}")
    train_split: str = Field("train", description="split to train on")
    eval_split: str = Field("val", description="split to evaluate on")
    train_limit: int | None = Field(None, ge=1, description="train on this many samples only, drawn by the data seed")
    flip: bool = Field(True, description="mirror half of the training images")
    loader: Literal["dali", "torch"] = Field("dali", description="dali, or the plain torch reference of the same plan")
    num_threads: int = Field(0, ge=0, description="decoding threads a worker; 0: cores / workers")
    prefetch: int = Field(2, ge=1, description="batches prepared ahead")
    read_threads: int = Field(64, ge=1, description="reads at once, at most; as many as the storage's latency asks for")
    readahead_mb: int = Field(256, ge=1, description="memory for encoded images read ahead, a worker")
    read_timeout_s: float = Field(120.0, gt=0, description="a read that takes longer stops the run")
    cache_folder: Path | None = Field(None, description="where files of a URL are kept; default: the user's cache")
    cache_gb: float = Field(100.0, gt=0, description="size of that folder; what was not used for longest goes")
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="an unreadable image stops the run, or is skipped"
    )


class DataConfig(SplitsConfig):
    """Which images, and how they become a classifier's input."""

    size: int = Field(224, ge=1, description="side of the network's input, pixels")
    sizes: tuple[SizeConfig, ...] = Field(
        (), description="other sizes to begin with, as [{size: 128, until: 30 epochs}]; then data.size"
    )
    eval_size: int | None = Field(None, ge=1, description="side of the input in evaluation; default: data.size")
    crop: Literal["random_resized", "pad", "whole"] = Field(
        "random_resized", description="training window: random area and aspect, random shift within padding, or all"
    )
    scale: Range = Field((0.08, 1.0), description="random_resized: share of the area, from and to")
    ratio: Range = Field((3 / 4, 4 / 3), description="random_resized: width to height, from and to")
    padding: int = Field(4, ge=0, description="pad: zeros around the image before the window is drawn, pixels")
    augment: tuple[AugmentConfig, ...] = Field(
        (),
        description="one after the other, as [{name: rand_augment, options: {magnitude: 7}}, {name: random_erasing}]",
    )
    repeats: int = Field(1, ge=1, description="an image comes this often in a row, augmented anew each time")
    eval_crop: float = Field(0.875, gt=0, le=1, description="evaluation window: centre, this share of the short side")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="subtracted, per channel, of 0 to 1")
    std: tuple[Positive, Positive, Positive] = Field(
        (0.229, 0.224, 0.225), description="divided by, per channel, of 0 to 1"
    )
    order: Literal["global", "blocks"] = Field(
        "global", description="global: any sample after any other; blocks: for disks that read well in sequence only"
    )
    block: int = Field(1024, ge=1, le=2**32, description="blocks: samples read together; 16 such are mixed")


def view(data: DataConfig) -> View:
    """How images become the network's input; raises LorotError if an augmentation or an option of it is none."""
    own = {name: getattr(data, name) for name in View.__dataclass_fields__ if name != "augment"}
    return View(**own, augment=tuple(augment.load(part.name, **part.options) for part in data.augment))
