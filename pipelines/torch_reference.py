"""The plan rendered in plain torch: what the device rendering is held to."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from pipelines.augment.operations import Operation
from pipelines.batch import DTYPES
from pipelines.errors import LorotError
from pipelines.inline_renderer import InlineRenderer
from pipelines.plan import Plan, View, take


def rotate_patch(images: Tensor, boxes: Tensor | np.ndarray, turns: Tensor | np.ndarray) -> Tensor:
    """Turn the content of one square box per image; exact, and nothing outside the box changes.

    Args:
        images: (N, C, H, W) of any dtype, device and memory format, all of which the result keeps.
        boxes: (N, 3) integers (y, x, side) inside the image.
        turns: (N,) integers, counter-clockwise quarter turns.

    Returns:
        A new (N, C, H, W) tensor.

    Raises:
        ValueError: a box is empty or reaches out of the image.
    """
    turned = images.clone(memory_format=torch.preserve_format)
    height, width = images.shape[-2:]
    # Blocks, one image at a time: gathering all pixels by index is a hundred times slower.
    for index, ((y, x, side), turn) in enumerate(zip(boxes.tolist(), turns.tolist(), strict=True)):
        if y < 0 or x < 0 or side < 1 or y + side > height or x + side > width:
            raise ValueError(f"box (y={y}, x={x}, side={side}) of image {index} does not fit {height} x {width} pixels")
        if turn % 4:
            block = (index, slice(None), slice(y, y + side), slice(x, x + side))
            turned[block] = torch.rot90(images[block], turn, (1, 2))
    return turned


def decode(encoded: bytes | np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an encoded file as it is shown: turned as its EXIF says.

    Raises:
        OSError, SyntaxError, ValueError: PIL cannot decode it, wholly.
    """
    data = encoded if isinstance(encoded, bytes) else encoded.tobytes()
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def apply(image: Tensor, code: int, amounts: Sequence[float]) -> Tensor:
    """One 8-bit operation of `augment.operations` on a (3, H, W) uint8 image; the result is a new one or the same."""
    operation, amount = Operation(code), float(amounts[0])
    if operation is Operation.SHEAR_X:
        return _sheared(image, [math.degrees(math.atan(amount)), 0.0])
    if operation is Operation.SHEAR_Y:
        return _sheared(image, [0.0, math.degrees(math.atan(amount))])
    if operation is Operation.TRANSLATE_X:
        return transforms.affine(image, angle=0.0, translate=[int(amount), 0], scale=1.0, shear=[0.0, 0.0])
    if operation is Operation.TRANSLATE_Y:
        return transforms.affine(image, angle=0.0, translate=[0, int(amount)], scale=1.0, shear=[0.0, 0.0])
    if operation is Operation.ROTATE:
        return transforms.rotate(image, amount)
    if operation is Operation.BRIGHTNESS:
        return transforms.adjust_brightness(image, amount)
    if operation is Operation.SATURATION:
        return transforms.adjust_saturation(image, amount)
    if operation is Operation.CONTRAST:
        return transforms.adjust_contrast(image, amount)
    if operation is Operation.SHARPNESS:
        return transforms.adjust_sharpness(image, amount)
    if operation is Operation.POSTERIZE:
        return transforms.posterize(image, int(amount))
    if operation is Operation.SOLARIZE:
        return transforms.solarize(image, amount)
    if operation is Operation.AUTO_CONTRAST:
        return transforms.autocontrast(image)
    if operation is Operation.EQUALIZE:
        return transforms.equalize(image)
    if operation is Operation.INVERT:
        return transforms.invert(image)
    if operation is Operation.HUE:
        return transforms.adjust_hue(image, amount)
    if operation is Operation.LIGHTING:
        shift = torch.tensor([float(value) for value in amounts[:3]])[:, None, None]
        return (image + shift).round_().clamp_(0, 255).to(torch.uint8)
    return image


def _sheared(image: Tensor, degrees: list[float]) -> Tensor:
    return transforms.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0.0, 0.0])


def render(sample: bytes | np.ndarray, view: View, plan: Plan, dtype: str = "float32") -> Tensor:
    """One sample as the network sees it.

    Args:
        sample: an encoded file, or pixels, (H, W, 3) uint8.
        plan: its row, N = 1.
        dtype: a key of `batch.DTYPES`.

    Returns:
        (3, size, size). Pixels are 8 bits until they are normalised, so that equal pixels stay equal.
    """
    pixels = sample if isinstance(sample, np.ndarray) and sample.ndim == 3 else decode(sample)
    image = torch.tensor(cut(pixels, plan.windows[0])).permute(2, 0, 1)[None]
    shape = (plan.size, plan.size)
    if image.shape[-2:] != shape:
        resized = F.interpolate(image.float(), shape, mode="bilinear", align_corners=False, antialias=True)
        image = resized.round_().clamp_(0, 255).to(torch.uint8)
    if plan.flips[0]:
        image = image.flip(3)
    image = image[0]
    for code, amounts in zip(plan.ops[0], plan.amounts[0], strict=True):
        image = apply(image, int(code), amounts)
    mean, std = torch.tensor(view.mean)[:, None, None] * 255, torch.tensor(view.std)[:, None, None] * 255
    finished = image if dtype == "uint8" else (image.float() - mean) / std
    for code, box in zip(plan.ops[0], plan.amounts[0], strict=True):
        if code == Operation.ERASE:
            y, x, height, width = (int(value) for value in box)
            finished[:, y : y + height, x : x + width] = mean.round() if dtype == "uint8" else 0.0
    return rotate_patch(finished[None], plan.boxes, plan.turns)[0].to(DTYPES[dtype])


def render_batch(
    samples: Sequence[bytes | np.ndarray], view: View, plan: Plan, render_pretext: bool = True, dtype: str = "float32"
) -> Tensor:
    """(N, 3, size, size) of `dtype`, channels_last; without `render_pretext` no box is turned."""
    if not render_pretext:
        plan = replace(plan, turns=np.zeros_like(plan.turns))
    images = [render(sample, view, take(plan, row), dtype) for row, sample in enumerate(samples)]
    return torch.stack(images).contiguous(memory_format=torch.channels_last)


def renderer(view: View, render_pretext: bool, dtype: str = "float32") -> InlineRenderer[Tensor]:
    """Renders batches (N, 3, size, size), channels_last, for a loader; raises LorotError for an unknown `dtype`."""
    if dtype not in DTYPES:
        raise LorotError(f"dtype {dtype!r} does not exist; there are {', '.join(DTYPES)}")
    return InlineRenderer(lambda samples, plan: render_batch(samples, view, plan, render_pretext, dtype))


def cut(pixels: np.ndarray, window: Sequence[int]) -> np.ndarray:
    """The window (y, x, height, width) of (H, W, 3) pixels; zeros where it reaches outside."""
    y, x, height, width = (int(value) for value in window)
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + height, pixels.shape[0]), min(x + width, pixels.shape[1])
    if (top, left, bottom, right) == (y, x, y + height, x + width):
        return pixels[top:bottom, left:right]
    result = np.zeros((height, width, 3), np.uint8)
    result[top - y : bottom - y, left - x : right - x] = pixels[top:bottom, left:right]
    return result
