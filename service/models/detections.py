"""What every detector takes and gives: padded batches of images, objects to learn from, objects found."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.instances import Instances

# Types of options; bounded, as a card of weights may come from anywhere.
Count = Annotated[int, Field(ge=1, le=100_000)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Detections(NamedTuple):
    """Objects found in one image, best first, in pixels of the network's input without its padding.

    Attributes:
        boxes: (k, 4) float32 x_min, y_min, x_max, y_max, half-open: the pixel in the corner alone is 0, 0, 1, 1.
        scores: (k,) float32 in 0 .. 1, descending.
        labels: (k,) int64, classes from 0.
        masks: (k, h, w) bool of the image's content, or None from a detector of boxes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


class Detector(nn.Module):
    """A network that finds objects. Whether it learns or finds is decided by `targets` alone, not by train or eval."""

    def forward(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Instances] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses of a batch, or, without `targets`, what is found in it.

        Args:
            images: (N, 3, H, W) normalised, zero padding at the bottom and the right, H and W multiples of 32.
            sizes: (N, 2) int64 height and width of each image's content.
            targets: N. Crowds and boxes without area are left out.

        Returns:
            With targets: float32 scalars by name, those of `detectors.loss_names`; "loss" is the one to minimise,
            the others are its parts before they are weighted. Every trainable parameter has a gradient, even where
            no image shows an object. Without: one `Detections` an image.

        Raises:
            ValueError: the detector learns from masks and a target has none; or H or W does not fit.
        """
        if targets is None:
            with torch.no_grad():
                return self.detect(images, sizes)
        return self.losses(images, sizes, [_learnable(target) for target in targets])

    def losses(self, images: Tensor, sizes: Tensor, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`forward` with targets that hold no crowds."""
        raise NotImplementedError

    def detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """`forward` without targets."""
        raise NotImplementedError


def _learnable(target: Instances) -> Instances:
    """A crowd is no single object, and a box without area has no logarithm of its sides."""
    kept = ~target.crowd & (target.boxes[:, 2:] > target.boxes[:, :2]).all(dim=1)
    masks = target.masks[kept] if len(target.masks) == len(kept) else target.masks
    return Instances(target.boxes[kept], target.labels[kept], masks, target.crowd[kept])
