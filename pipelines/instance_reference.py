"""Images with objects rendered in plain torch and torchvision: what DALI's rendering is held to."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import BoundingBoxes

from pipelines import run_lengths
from pipelines.inline_renderer import InlineRenderer
from pipelines.instance_plan import InstancePlan, InstanceView
from pipelines.plan import take
from pipelines.rendered import Rendered
from pipelines.torch_reference import decode


def render(
    sample: bytes | np.ndarray, view: InstanceView, plan: InstancePlan, with_masks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One image and its objects as the network sees them.

    Args:
        sample: an encoded file, or pixels, (H, W, 3) uint8.
        plan: its row, N = 1.

    Returns:
        The image (3, H, W) float32 on the plan's canvas, boxes (K, 4) float32, masks (K, h, w) uint8. Pixels are 8 bits
        until they are normalised; a mask's pixel is that of the source at its centre.
    """
    pixels = sample if isinstance(sample, np.ndarray) and sample.ndim == 3 else decode(sample)
    image = torch.tensor(pixels).permute(2, 0, 1)
    source = tuple(image.shape[-2:])
    size = [int(side) for side in plan.sizes[0]]
    if list(source) != size:
        resized = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False, antialias=True)[0]
        image = resized.round_().clamp_(0, 255).to(torch.uint8)
    known = plan.objects[0]
    boxes = BoundingBoxes(torch.tensor(known.boxes), format="XYXY", canvas_size=source)
    boxes = transforms.clamp_bounding_boxes(transforms.resize(boxes, size))
    masks = torch.zeros((0, 0, 0), dtype=torch.uint8)
    if with_masks:
        masks = torch.zeros((len(known), *size), dtype=torch.uint8)
        # One after the other: all of a large image at once, at its own size, would take gigabytes.
        for number, runs in enumerate(known.segmentations):
            masks[number] = _nearest(torch.from_numpy(run_lengths.decode([runs], *source)), size)[0]
    if plan.flips[0]:
        image, masks = image.flip(2), masks.flip(2)
        boxes = transforms.horizontal_flip(boxes)
    mean, std = torch.tensor(view.mean)[:, None, None] * 255, torch.tensor(view.std)[:, None, None] * 255
    height, width = plan.canvas
    padded = F.pad((image.float() - mean) / std, (0, width - size[1], 0, height - size[0]))
    return padded, boxes.as_subclass(Tensor), masks


def renderer(view: InstanceView, with_masks: bool) -> InlineRenderer[Rendered]:
    """Renders batches for a loader."""

    def batch(samples: Sequence[bytes | np.ndarray], plan: InstancePlan) -> Rendered:
        parts = [render(sample, view, take(plan, row), with_masks) for row, sample in enumerate(samples)]
        images, boxes, masks = zip(*parts, strict=True)
        return Rendered(torch.stack(images).contiguous(memory_format=torch.channels_last), boxes, masks)

    return InlineRenderer(batch)


def _nearest(masks: Tensor, size: list[int]) -> Tensor:
    """(K, H, W) masks of another size, in whole numbers: no rounding decides which pixel is nearest."""
    rows, columns = (
        ((2 * torch.arange(new) + 1) * old).div(2 * new, rounding_mode="floor")
        for new, old in zip(size, masks.shape[1:], strict=True)
    )
    return masks[:, rows][:, :, columns]
