"""What every detector takes and gives: padded batches of images, objects to learn from, objects found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipelines.instances import Instances

# Types of options; bounded, as a card of weights may come from anywhere.
Count = Annotated[int, Field(ge=1, le=100_000)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class SoftMasks:
    """Masks as a network gives them: probabilities, which are compared with the threshold at the size asked for.

    A mask that was made at one size and interpolated to another has lost what the probabilities say about its edge.

    Attributes:
        probabilities: (k, h, w) float32 in 0 .. 1, over the padded input at 1 / `stride` of its size.
        stride: pixels of the input to one of the probabilities.
        threshold: a pixel above it belongs to the object.
    """

    probabilities: Tensor
    stride: int
    threshold: float

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.probabilities)

    def drawn(self, number: int, size: Sequence[int], wanted: Sequence[int] | None = None) -> Tensor:
        """One mask, (height, width) bool.

        As the authors of SOLOv2 do it: bilinearly to the padded input, cut to the content, bilinearly on to `wanted`.

        Args:
            number: which one, from 0 on.
            size: (height, width) of the input's content.
            wanted: (height, width) that the content becomes; default: as it is.
        """
        soft = self.probabilities[None, number : number + 1]
        soft = _resized(soft, [side * self.stride for side in soft.shape[2:]])[..., : size[0], : size[1]]
        if wanted is not None and tuple(wanted) != tuple(size):
            soft = _resized(soft, wanted)
        return soft[0, 0] > self.threshold

    def all_drawn(self, size: Sequence[int]) -> Tensor:
        """(k, height, width) bool of the content of that size."""
        device = self.probabilities.device
        masks = torch.zeros(len(self), int(size[0]), int(size[1]), dtype=torch.bool, device=device)
        for number in range(len(self)):
            masks[number] = self.drawn(number, size)
        return masks


class Detections(NamedTuple):
    """Objects found in one image, best first, in pixels of the network's input without its padding.

    Attributes:
        boxes: (k, 4) float32 x_min, y_min, x_max, y_max, half-open: the pixel in the corner alone is 0, 0, 1, 1.
        scores: (k,) float32 in 0 .. 1, descending.
        labels: (k,) int64, classes from 0.
        masks: (k, h, w) bool of the image's content, or None from a detector of boxes.
        soft: what the masks were made of, for another size than the content's; None without masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None
    soft: SoftMasks | None = None


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


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, pixel centres at half integers: (N, C, h, w) -> (N, C, *size)."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _learnable(target: Instances) -> Instances:
    """A crowd is no single object, and a box without area has no logarithm of its sides."""
    kept = ~target.crowd & (target.boxes[:, 2:] > target.boxes[:, :2]).all(dim=1)
    masks = target.masks[kept] if len(target.masks) == len(kept) else target.masks
    return Instances(target.boxes[kept], target.labels[kept], masks, target.crowd[kept])
