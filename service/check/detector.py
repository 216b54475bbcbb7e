"""What a detector's training amounts to, on the registered classifier that it begins with."""

from typing import TYPE_CHECKING

from service import bundle, resolution
from service.check.classifier import kept_bytes
from service.check.findings import FLOAT, STATES, Findings, Outline, completed, memory, outline
from service.config import DetectionConfig, ModelConfig
from service.errors import CheckpointError, TrackingError

if TYPE_CHECKING:
    from torch import Tensor

    from service.models.detectors import Detector

# Assumed of what is not there, so that the network can still be counted: COCO's classes, the papers' network.
_CLASSES_UNKNOWN = 80
_TRUNK_UNKNOWN = ModelConfig(name="resnet50")
_DIVISOR = 32


def outlined(job: DetectionConfig, workers: int | None = None) -> tuple[Outline[DetectionConfig], ModelConfig]:
    """As `check.outline`, and the network that the job begins with."""
    trunk, about, absent = _trunk(job)
    return outline(job, workers, trunk=about, absent=absent), trunk


def examine(job: DetectionConfig, workers: int | None = None) -> Findings[DetectionConfig]:
    """As `check.examine`."""
    known, trunk = outlined(job, workers)
    classes = known.splits[0].classes if known.splits else _CLASSES_UNKNOWN
    model = network(job, trunk, classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    checkpoint = FLOAT * (parameters * (1 + (job.ema is not None)) + trained * STATES[job.optimizer.name])
    return completed(
        known,
        # The newest ones, the best, the one being written; the detector, its copy with the run's record, the trunk's.
        checkpoint * (job.checkpoint.keep_last + 2) + 3 * parameters * FLOAT,
        estimate_memory(job, model, known.workers),
        classes=classes,
        parameters=parameters,
        pretext_parameters=0,
        trained_parameters=trained,
        checkpoint_bytes=checkpoint,
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
