"""What is minimised: each objective turns (model, batch) into named losses. The training loop knows none by name.

The names follow tables 1 and 6 of the LoRot paper: `supervised` is its baseline, `multi_task` (MT), `augmentation`
(DA) and `parallel_task` (PT) are three ways to use a pretext task. An objective is a pure function of its arguments,
but for what the model's own BatchNorm keeps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.batch import Batch
from pipelines.torch_reference import rotate_patch
from service.config import ObjectiveConfig
from service.errors import ConfigError
from service.models.heads import Outputs

Model = Callable[[Tensor], Outputs]


class Losses(NamedTuple):
    """An objective's result.

    Attributes:
        losses: scalars by name, float32, means over the valid samples: "loss" (minimise this one), "class_loss", and
            "pretext_loss" if there is one.
        logits: (N, num_classes), aligned with the batch's labels and `valid`.
        pretext_logits: (M, num_pretext), or None without a pretext loss. M is N, or 4 N if all turns were forwarded.
        pretext_labels: (M,) int64, or None.
        pretext_valid: (M,) bool, or None.
    """

    losses: dict[str, Tensor]
    logits: Tensor
    pretext_logits: Tensor | None = None
    pretext_labels: Tensor | None = None
    pretext_valid: Tensor | None = None


def supervised(model: Model, batch: Batch, config: ObjectiveConfig) -> Losses:
    """Cross-entropy of the classes, with label smoothing."""
    logits = model(batch.images).logits
    class_loss = _cross_entropy(logits, batch.labels, batch.valid, config.label_smoothing)
    return Losses({"loss": class_loss, "class_loss": class_loss}, logits)


def multi_task(model: Model, batch: Batch, config: ObjectiveConfig) -> Losses:
    """Both cross-entropies of one forward pass over images that the pipeline has transformed.

    One shared pass, as the paper counts forwarded samples; LoRot-E's official code makes two.
    """
    outputs = model(batch.images)
    return _both(outputs.logits, outputs.pretext_logits, batch.pretext_labels, batch.valid, batch, config)


def parallel_task(model: Model, batch: Batch, config: ObjectiveConfig) -> Losses:
    """The class loss on the images as they are, the pretext loss on a separate transformed batch, in one forward pass.

    `batch.images` are untransformed. With `turns: all` every image is forwarded at all four turns of its box, and the
    one at turn 0 also gives the class logits, as in the ss-ood code of Hendrycks et al. 2019; the pretext loss is the
    mean over all 4 N. With `turns: one` N images as they are and N at their drawn turn are forwarded, and the
    pretext loss is the mean over the latter. Any task's label grows by one per turn, so turn t has label
    `pretext_labels - turns + t`.
    """
    count = len(batch.images)
    if config.turns == "all":
        turned = [rotate_patch(batch.images, batch.boxes, torch.full_like(batch.turns, turn)) for turn in (1, 2, 3)]
        outputs = model(torch.cat([batch.images, *turned]))
        first = batch.pretext_labels - batch.turns
        labels, valid = torch.cat([first, first + 1, first + 2, first + 3]), batch.valid.repeat(4)
        pretext_logits = outputs.pretext_logits
    else:
        turned = [rotate_patch(batch.images, batch.boxes, batch.turns)]
        outputs = model(torch.cat([batch.images, *turned]))
        labels, valid = batch.pretext_labels, batch.valid
        pretext_logits = None if outputs.pretext_logits is None else outputs.pretext_logits[count:]
    return _both(outputs.logits[:count], pretext_logits, labels, valid, batch, config)


@dataclass(frozen=True)
class _Objective:
    function: Callable[[Model, Batch, ObjectiveConfig], Losses]
    renders_pretext: bool
    learns_pretext: bool


_OBJECTIVES = {
    "supervised": _Objective(supervised, renders_pretext=False, learns_pretext=False),
    "multi_task": _Objective(multi_task, renders_pretext=True, learns_pretext=True),
    # The class loss alone, of the images that the pipeline has transformed.
    "augmentation": _Objective(supervised, renders_pretext=True, learns_pretext=False),
    "parallel_task": _Objective(parallel_task, renders_pretext=False, learns_pretext=True),
}


def compute(model: Model, batch: Batch, config: ObjectiveConfig) -> Losses:
    """The losses of the objective that `config` names.

    Raises:
        ConfigError: the objective has a pretext loss and the model no pretext head.
    """
    return _OBJECTIVES[config.name].function(model, batch, config)


def available() -> tuple[str, ...]:
    """Names of all objectives."""
    return tuple(_OBJECTIVES)


def renders_pretext(name: str) -> bool:
    """Whether the pipeline transforms the images; if not, the objective gets them as they are, with boxes and turns."""
    return _OBJECTIVES[name].renders_pretext


def learns_pretext(name: str) -> bool:
    """Whether there is a pretext loss. Only then may the model have a pretext head: an unused one gets no gradient."""
    return _OBJECTIVES[name].learns_pretext


def loss_names(name: str) -> tuple[str, ...]:
    """The keys of its `Losses.losses`, in order."""
    return ("loss", "class_loss", "pretext_loss") if learns_pretext(name) else ("loss", "class_loss")


def _both(
    logits: Tensor, pretext_logits: Tensor | None, labels: Tensor, valid: Tensor, batch: Batch, config: ObjectiveConfig
) -> Losses:
    if pretext_logits is None:
        raise ConfigError(
            f"objective.name: {config.name!r} needs a pretext head and the model has none; choose a pretext task with "
            "labels (rotation, lorot_i, lorot_e), or objective 'augmentation'"
        )
    class_loss = _cross_entropy(logits, batch.labels, batch.valid, config.label_smoothing)
    pretext_loss = _cross_entropy(pretext_logits, labels, valid)
    loss = class_loss + config.pretext_weight * pretext_loss
    return Losses(
        {"loss": loss, "class_loss": class_loss, "pretext_loss": pretext_loss}, logits, pretext_logits, labels, valid
    )


def _cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the valid samples; 0 if there are none. In float32: autocast gives logits in half precision."""
    each = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    return torch.where(valid, each, 0.0).sum() / valid.sum().clamp(min=1)
