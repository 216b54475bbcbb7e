"""What a pipeline hands to a training or an evaluation step."""

from typing import NamedTuple

import torch
from torch import Tensor

# What a renderer can be asked for. Numbers are normalised in float32 and rounded once; uint8 is not normalised.
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}


class Batch(NamedTuple):
    """One micro-batch on the device. N is constant over a run: a padded sample has `valid` False and counts nowhere.

    Attributes:
        images: (N, 3, S, S) float32 (or what the loader was asked for), channels_last. Normalised, but for uint8, which
            is R, G, B as an image has them. In training S may change from step to step.
        labels: (N,) int64 class indices.
        pretext_labels: (N,) int64 labels of the pretext task (0 without one).
        boxes: (N, 3) int64 square boxes (y, x, side) in pixels of `images`.
        turns: (N,) int64 counter-clockwise quarter turns of the box's content.
        ids: (N,) int64 sample ids: rows of the manifest.
        valid: (N,) bool.
    """

    images: Tensor
    labels: Tensor
    pretext_labels: Tensor
    boxes: Tensor
    turns: Tensor
    ids: Tensor
    valid: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; a tensor that is there already is not copied."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))
