"""What a detector's training amounts to, on the registered classifier that it begins with."""

from typing import TYPE_CHECKING

from service import bundle, config, resolution
from service.check.classifier import kept_bytes
from service.check.findings import FLOAT, STATES, Findings, free_bytes, memory, plan, splits, warnings
from service.config import DetectionConfig, ModelConfig
from service.errors import CheckpointError, TrackingError
from service.jobs.local import num_workers

if TYPE_CHECKING:
    from torch import Tensor

    from service.models.detectors import Detector

# Assumed of what is not there, so that the network can still be counted: COCO's classes, the papers' network.
_CLASSES_UNKNOWN = 80
_TRUNK_UNKNOWN = ModelConfig(name="resnet50")
_DIVISOR = 32


def examine(job: DetectionConfig, workers: int | None = None) -> Findings[DetectionConfig]:
    """As `check.examine`."""
    count = num_workers(job, workers)
    accumulation = config.accumulation_steps(job, count)
    found, missing = splits(job)
    classes = found[0].classes if found else _CLASSES_UNKNOWN
    trunk, about, absent = _trunk(job)
    model = network(job, trunk, classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needs = estimate_memory(job, model, count)
    checkpoint = FLOAT * (parameters * (1 + (job.ema is not None)) + trained * STATES[job.optimizer.name])
    # The newest ones, the best, the one being written; the detector, its copy with the run's record, and the trunk's.
    storage = checkpoint * (job.checkpoint.keep_last + 2) + 3 * parameters * FLOAT
    free = free_bytes(job)
    return Findings(
        job=job,
        workers=count,
        accumulation=accumulation,
        splits=found,
        missing=(*missing, *absent),
        plan=plan(job, found[0].samples) if not missing else None,
        classes=classes,
        parameters=parameters,
        pretext_parameters=0,
        memory=needs,
        checkpoint_bytes=checkpoint,
        storage_bytes=storage,
        free_bytes=free,
        warnings=tuple(warnings(job, count, sum(needs.values()), storage, free)),
        trained_parameters=trained,
        trunk=about,
    )


def network(job: DetectionConfig, trunk: ModelConfig, classes: int) -> "Detector":
    """The detector without memory for its weights (on torch's meta device).

    Raises:
        ConfigError: an option is none, or cannot be.
        CheckpointError: the trunk does not fit.
    """
    import torch

    from service import models
    from service.models import detectors

    with torch.device("meta"):
        return detectors.build(job.model.name, models.build(trunk, classes, 0), classes, **job.model.options)


def estimate_memory(job: DetectionConfig, model: "Detector", workers: int) -> dict[str, int]:
    """Bytes a worker needs, by what for, as for a classifier; what the losses and the masks need is not counted."""
    import torch

    weights = sum(parameter.numel() for parameter in model.parameters()) * FLOAT
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) * FLOAT
    # The largest input: of a photograph that is as long as its long side may be, padded to what the pyramid divides.
    sides = [-(-side // _DIVISOR) * _DIVISOR for side in (max(job.data.short_sides), job.data.long_side)]
    images = torch.empty(1, 3, *sides, device="meta")
    activations = kept_bytes(model, lambda: _outputs(model.train(), images)) * job.micro_batch
    batch = job.micro_batch * 3 * sides[0] * sides[1] * FLOAT
    return memory(job, workers, weights=weights, trained=trained, activations=activations, batch=batch)


def _outputs(model: "Detector", images: "Tensor") -> object:
    """All that has weights, without the losses."""
    from service.models.retinanet import RetinaNet

    if isinstance(model, RetinaNet):
        return model.head(list(model.backbone(images).values()))
    return model._predict(images)  # type: ignore[operator]


def _trunk(job: DetectionConfig) -> tuple[ModelConfig, str, tuple[str, ...]]:
    """The network that the job begins with, what to say of it, and why it is not there, if it is not."""
    uri = job.model.backbone
    assert uri is not None, "the configuration was checked"
    try:
        resolved = resolution.resolve(uri, job.tracking.uri)
        card = bundle.read_card(resolved.folder)
    except (CheckpointError, TrackingError) as error:
        return _TRUNK_UNKNOWN, f"{uri}, taken for a {_TRUNK_UNKNOWN.name}", (str(error),)
    version = "" if resolved.uri == uri else f", now {resolved.uri}"
    return (
        ModelConfig(**card.model),
        f"{uri}{version}: {card.model['name']}, trained on {card.data or 'unknown data'}",
        (),
    )
