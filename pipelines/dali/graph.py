"""What a graph has to do, whichever way it is built."""

from dataclasses import dataclass
from typing import Any

import torch
from nvidia.dali import fn, types
from torch import Tensor

from pipelines.augment.operations import Operation
from pipelines.plan import View

DTYPES = ("float32", "float16", "bfloat16", "uint8")


@dataclass(frozen=True)
class Graph:
    """What a graph has to do; operators for the rest are left out.

    Attributes:
        view: mean and std of the output; its size comes in with each batch.
        encoded: samples are image files, not pixels.
        window: "inside" the image, or one that "pads" (may reach over its edges), or "whole".
        resizes: windows are not all of the output's size.
        flips, rotates: some sample may be mirrored, some box may be turned.
        slots: which operations may stand at each of the K places of `Plan.ops`.
        dtype: of the output, one of `DTYPES`; uint8 is not normalised.
    """

    view: View
    encoded: bool
    window: str
    resizes: bool
    flips: bool
    rotates: bool
    slots: tuple[frozenset[Operation], ...] = ()
    dtype: str = "float32"


def decode(files: Any, device: str, window: tuple[Any, Any] | None = None) -> Any:
    """Image files decoded as they are shown, (H, W, 3) uint8; of a `window` (anchors, shapes) nothing but that.

    The window counts in pixels of the upright image: the EXIF's orientation is applied. The GPU's decoder interpolates
    colours as the one on the CPU does.
    """
    options: dict[str, Any] = {
        "device": "mixed" if device == "gpu" else "cpu",
        "adjust_orientation": True,
        "jpeg_fancy_upsampling": True,
    }
    if window is not None:
        return fn.decoders.image_slice(files, *window, axes=[0, 1], **options)
    return fn.decoders.image(files, **options)


def numbers(name: str, ndim: int) -> Any:
    """An input of 32-bit integers, one array per sample."""
    return fn.external_source(name=name, dtype=types.INT32, ndim=ndim)


def images_of(output: Any, dtype: str) -> Tensor:
    """(N, 3, H, W) of `dtype`, channels_last, over the memory of an output (N, H, W, 3)."""
    images: Tensor = torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
    # Halves come out as integers of their bits, or as floats that are to be rounded.
    return images.view(getattr(torch, dtype)) if images.dtype == torch.int16 else images.to(getattr(torch, dtype))
