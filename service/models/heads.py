"""A trunk of stages with one linear head for the classes and one, if asked for, for the pretext task."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn


class Outputs(NamedTuple):
    """What a forward pass returns.

    Attributes:
        logits: (N, num_classes).
        pretext_logits: (N, num_pretext), or None without a pretext head.
    """

    logits: Tensor
    pretext_logits: Tensor | None


class Classifier(nn.Module):
    """Stages run in order, a mean over space, and both heads side by side on the same (N, C) vector.

    A stage keeps its name, so the state dict's keys are those of the network the stages were taken from
    (`conv1.weight`, `layer1.0.bn1.bias`, ...) and `fc.*`, `pretext_fc.*`.
    """

    def __init__(self, stages: Mapping[str, nn.Module], num_channels: int, num_classes: int, num_pretext: int) -> None:
        super().__init__()
        for name, stage in stages.items():
            self.add_module(name, stage)
        self._stages = tuple(stages)
        self.fc = nn.Linear(num_channels, num_classes)
        self.pretext_fc = nn.Linear(num_channels, num_pretext) if num_pretext else None

    def features(self, images: Tensor) -> Tensor:
        """The last feature maps before pooling: (N, 3, H, W) -> (N, C, h, w)."""
        maps = images
        for name in self._stages:
            maps = getattr(self, name)(maps)
        return maps

    def forward(self, images: Tensor) -> Outputs:
        """(N, 3, H, W) -> logits of both heads."""
        pooled = self.features(images).mean(dim=(2, 3))
        return Outputs(self.fc(pooled), None if self.pretext_fc is None else self.pretext_fc(pooled))
