"""The graph for images with objects in them, of stock operators and written once with a `device`.

Images are brought to their planned size and mirrored, and masks mirrored with them. Masks come in at that size: they
are decoded on the host anyway, one after the other, as all of a large image at its own size would take gigabytes. The
boxes are a few numbers, which the plan has worked out already; they pass by.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types

from pipelines import run_lengths
from pipelines.dali.graph import decode, images_of, numbers
from pipelines.instance_plan import InstancePlan, InstanceView, moved_boxes
from pipelines.rendered import Rendered

ASIDE: tuple[str, ...] = ("boxes", "counts")


@dataclass(frozen=True)
class InstanceGraph:
    """What a graph has to do; operators for the rest are left out.

    Attributes:
        view: mean and std of the output; sizes come in with each batch.
        encoded: samples are image files, not pixels.
        flips: some sample may be mirrored.
        masks: masks come with the images.
    """

    view: InstanceView
    encoded: bool
    flips: bool
    masks: bool


def outline(graph: InstanceGraph, device: str) -> tuple[Any, ...]:
    """The graph's outputs, inside a pipeline: images (H, W, 3) float32 of one size, and masks (K, h, w) uint8."""
    if graph.encoded:
        files = fn.external_source(name="samples", dtype=types.UINT8, ndim=1)
        images = decode(files, device)
    else:
        images = fn.external_source(name="samples", dtype=types.UINT8, ndim=3, layout="HWC")
        images = images.gpu() if device == "gpu" else images
    size = fn.external_source(name="sizes", dtype=types.FLOAT, ndim=1)
    images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    flips = numbers("flips", ndim=0) if graph.flips else None
    if flips is not None:
        images = fn.flip(images, horizontal=flips)
    canvas = fn.external_source(name="canvas", dtype=types.FLOAT, ndim=1)
    images = fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="HWC",
        mean=[255 * mean for mean in graph.view.mean],
        std=[255 * std for std in graph.view.std],
        crop=canvas,
        crop_pos_x=0.0,
        crop_pos_y=0.0,
        out_of_bounds_policy="pad",
        fill_values=[0.0],
    )
    if not graph.masks:
        return (images,)
    masks = fn.external_source(name="masks", dtype=types.UINT8, ndim=3, layout="CHW")
    masks = masks.gpu() if device == "gpu" else masks
    if flips is not None:
        masks = fn.flip(masks, horizontal=flips)
    return images, masks


def prepare(graph: InstanceGraph, plan: InstancePlan, samples: list[np.ndarray]) -> dict[str, Any]:
    """The graph's inputs for one batch, and what passes by it."""
    count = len(plan.ids)
    inputs: dict[str, Any] = {
        "samples": samples,
        "sizes": plan.sizes.astype(np.float32),
        "canvas": np.tile(np.array(plan.canvas, np.float32), (count, 1)),
        "boxes": [moved_boxes(plan, row) for row in range(count)],
        "counts": [len(own) for own in plan.objects],
    }
    if graph.flips:
        inputs["flips"] = plan.flips.astype(np.int32)
    if graph.masks:
        inputs["masks"] = [
            # DALI takes no batch with nothing in it: an image without objects gets a mask that is not handed out.
            run_lengths.sampled(own.segmentations, old, new) if len(own) else np.zeros((1, *new), np.uint8)
            for own, old, new in zip(plan.objects, plan.source_sizes.tolist(), plan.sizes.tolist(), strict=True)
        ]
    return inputs


def finish(graph: InstanceGraph, outputs: Any, aside: dict[str, Any]) -> Rendered:
    """Images, boxes and masks of one batch."""
    images = images_of(outputs[0], "float32")
    boxes = tuple(torch.from_numpy(own) for own in aside["boxes"])
    if not graph.masks:
        return Rendered(images, boxes, tuple(torch.zeros((0, 0, 0), dtype=torch.uint8) for _ in boxes))
    masks = (torch.from_dlpack(outputs[1][row])[:count] for row, count in enumerate(aside["counts"]))
    return Rendered(images, boxes, tuple(masks))
