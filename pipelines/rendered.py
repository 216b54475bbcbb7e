"""What a renderer makes of images with objects in them."""

from typing import NamedTuple

from torch import Tensor


class Rendered(NamedTuple):
    """N images and their objects, in pixels of the contents.

    Attributes:
        images: (N, 3, H, W) float32, channels_last.
        boxes: N times (K, 4) float32.
        masks: N times (K, h, w) uint8; (0, 0, 0) if none were asked for.
    """

    images: Tensor
    boxes: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
