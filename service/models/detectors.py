"""Detectors by name, each over the trunk of a registered classifier."""

import difflib
from dataclasses import fields
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from service.errors import ConfigError
from service.models import retinanet, solov2
from service.models.detections import Detections, Detector, SoftMasks
from service.models.heads import Classifier


class _Kind(NamedTuple):
    network: type[Detector]
    options: type[Any]
    loss_names: tuple[str, ...]


_KINDS = {
    "retinanet": _Kind(retinanet.RetinaNet, retinanet.Options, ("loss", "class_loss", "box_loss")),
    "solov2": _Kind(solov2.SOLOv2, solov2.Options, ("loss", "class_loss", "mask_loss")),
}


def build(name: str, trunk: Classifier, num_classes: int, /, **options: Any) -> Detector:
    """A detector with the trunk's weights; all that comes after them is drawn from torch's global random state.

    Args:
        name: "retinanet" (boxes) or "solov2" (masks, and the boxes around them).
        trunk: its stages are copied, its pooling and heads left out; it is not changed.
        num_classes: classes of objects; labels are 0 .. num_classes - 1, there is none for the background.
        options: fields of the detector's `Options`.

    Raises:
        ConfigError: no such detector or option, or a value that cannot be.
        CheckpointError: the trunk does not fit: which of its layers, and their shapes.
    """
    kind = _kind(name)
    known = [field.name for field in fields(kind.options)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{name} has no option {option!r}; {meant}")
    if num_classes < 1:
        raise ConfigError(f"{name}: {num_classes} classes of objects; there must be 1 at least")
    try:
        chosen = TypeAdapter(kind.options).validate_python(options)
    except ValidationError as error:
        problems = [" ".join([*map(str, problem["loc"]), problem["msg"]]) for problem in error.errors()]
        raise ConfigError(f"{name}: an option cannot be: {'; '.join(problems)}") from None
    return kind.network(trunk, num_classes, chosen)


def loss_names(name: str) -> tuple[str, ...]:
    """The keys of its losses, in order, "loss" first.

    Raises:
        ConfigError: no such detector.
    """
    return _kind(name).loss_names


def available() -> tuple[str, ...]:
    """Names of all detectors."""
    return tuple(_KINDS)


def _kind(name: str) -> _Kind:
    if name not in _KINDS:
        raise ConfigError(f"there is no detector {name!r}; there are {', '.join(_KINDS)}")
    return _KINDS[name]


__all__ = ["Detections", "Detector", "SoftMasks", "available", "build", "loss_names"]
