"""The plan rendered in plain torch: what the device rendering is held to."""

import io
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipelines.plan import Plan, View
from pipelines.soundness import UnsoundError


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


def decode(sample: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an encoded file, (n,) uint8, as stored: the orientation in its EXIF is not applied.

    Raises:
        OSError, SyntaxError, ValueError: PIL cannot decode it, wholly.
    """
    with Image.open(io.BytesIO(sample.tobytes())) as image:
        return np.asarray(image.convert("RGB"))


def render(sample: np.ndarray, view: View, window: Sequence[int], flip: bool, box: Sequence[int], turns: int) -> Tensor:
    """One sample as the network sees it.

    Args:
        sample: an encoded file, (n,) uint8, or pixels, (H, W, 3) uint8.
        window, flip, box, turns: a row of a `Plan`.

    Returns:
        (3, size, size) float32, normalised. Pixels are rounded to 8 bits before that, so that equal pixels stay equal.
    """
    pixels = sample if sample.ndim == 3 else decode(sample)
    image = torch.tensor(cut(pixels, window)).permute(2, 0, 1)[None]
    if image.shape[-2:] != (view.size, view.size):
        shape = (view.size, view.size)
        resized = F.interpolate(image.float(), shape, mode="bilinear", align_corners=False, antialias=True)
        image = resized.round_().clamp_(0, 255).to(torch.uint8)
    if flip:
        image = image.flip(3)
    image = rotate_patch(image, torch.tensor([[int(value) for value in box]]), torch.tensor([int(turns)]))
    mean, std = torch.tensor(view.mean)[:, None, None] * 255, torch.tensor(view.std)[:, None, None] * 255
    return (image[0].float() - mean) / std


def render_batch(samples: Sequence[np.ndarray], view: View, plan: Plan, render_pretext: bool = True) -> Tensor:
    """(N, 3, size, size) float32, channels_last; without `render_pretext` no box is turned."""
    turns = plan.turns if render_pretext else np.zeros_like(plan.turns)
    rows = zip(samples, plan.windows, plan.flips, plan.boxes, turns, strict=True)
    images = [render(sample, view, window, bool(flip), box, turn) for sample, window, flip, box, turn in rows]
    return torch.stack(images).contiguous(memory_format=torch.channels_last)


class Renderer:
    """Renders in `prepare`, in the calling thread; `submit` and `collect` only queue."""

    depth = 1
    ready = True

    def __init__(self, view: View, render_pretext: bool) -> None:
        self._view = view
        self._render_pretext = render_pretext
        self._rendered: deque[Tensor] = deque()

    def prepare(self, samples: Sequence[np.ndarray], plan: Plan) -> Tensor:
        """The batch's images; raises UnsoundError if one of them cannot be decoded."""
        try:
            return render_batch(samples, self._view, plan, self._render_pretext)
        except (OSError, SyntaxError, ValueError) as error:
            raise UnsoundError(str(error)) from None

    def submit(self, images: Tensor) -> None:
        """Hand in one prepared batch."""
        self._rendered.append(images)

    def collect(self) -> Tensor:
        """The oldest batch submitted: (N, 3, size, size) float32, channels_last."""
        return self._rendered.popleft()

    def fault(self, sample: np.ndarray, plan: Plan) -> str | None:
        """Why PIL cannot decode one sample, of which `plan` is the one row; None if it can."""
        try:
            self.prepare([sample], plan)
        except UnsoundError as error:
            return f"the file is damaged: {error}"
        return None

    def close(self) -> None:
        """Nothing is held but what was not collected."""
        self._rendered.clear()


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
