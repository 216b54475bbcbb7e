"""The graph of stock operators, written once with a `device`: a GPU decodes and does the rest there.

It runs on a CPU too, which is how it is tested. Every choice comes in with the samples, none is drawn inside. Pixels
are 8 bits until they are normalised, so that equal pixels stay equal and a turned box leaves no seam on a blank image.
"""

from typing import Any

import numpy as np
from nvidia.dali import fn, types
from torch import Tensor

from pipelines.augment.operations import Operation
from pipelines.dali import augment
from pipelines.dali.graph import Graph, decode, images_of, numbers
from pipelines.plan import Plan

ASIDE: tuple[str, ...] = ()
_TYPES = {"float32": types.FLOAT, "float16": types.FLOAT16, "bfloat16": types.FLOAT, "uint8": types.UINT8}


def outline(graph: Graph, device: str) -> Any:
    """The graph's output (size, size, 3), inside a pipeline; what is to be bfloat16 comes out as float32."""
    images = _cut(graph, device)
    if graph.resizes:
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    if graph.flips:
        images = fn.flip(images, horizontal=numbers("flips", ndim=0))
    for number, allowed in enumerate(graph.slots):
        images = augment.apply(images, allowed, number, device)
    # Bytes are turned with less traffic than floats, but what is erased has to turn with the box.
    erasers = [number for number, allowed in enumerate(graph.slots) if Operation.ERASE in allowed]
    if graph.rotates and not erasers:
        images = _turn(images)
    if graph.dtype != "uint8":
        images = fn.crop_mirror_normalize(
            images,
            dtype=_TYPES[graph.dtype],
            output_layout="HWC",
            mean=[255 * mean for mean in graph.view.mean],
            std=[255 * std for std in graph.view.std],
        )
    fill = [round(255 * mean) for mean in graph.view.mean] if graph.dtype == "uint8" else [0.0]
    for number in erasers:
        images = augment.erase(images, number, fill)
    return _turn(images) if graph.rotates and erasers else images


def prepare(graph: Graph, plan: Plan, samples: list[np.ndarray]) -> dict[str, Any]:
    """The graph's inputs for one batch."""
    inputs: dict[str, Any] = {"samples": samples, **augment.prepare(graph.slots, plan)}
    if graph.resizes:
        inputs["size"] = np.full((len(plan.ids), 2), plan.size, np.float32)
    if graph.window != "whole":
        inputs["anchors"] = plan.windows[:, :2].astype(np.int32)
        inputs["shapes"] = plan.windows[:, 2:].astype(np.int32)
    if graph.flips:
        inputs["flips"] = plan.flips.astype(np.int32)
    if graph.rotates:
        corners = plan.boxes[:, :2].astype(np.int32)
        inputs["box_anchors"] = corners
        inputs["box_shapes"] = np.repeat(plan.boxes[:, 2:], 2, axis=1).astype(np.int32)
        inputs["paste_size"] = np.full((len(plan.ids), 2), plan.size, np.int32)
        inputs["angles"] = (90 * plan.turns).astype(np.float32)
        # Two things are pasted: the image itself at its own corner, then the turned patch.
        inputs["pastes"] = np.stack([np.zeros_like(corners), corners], axis=1)
    return inputs


def finish(graph: Graph, outputs: Any, aside: dict[str, Any]) -> Tensor:
    """(N, 3, size, size), channels_last."""
    return images_of(outputs[0], graph.dtype)


def _turn(images: Any) -> Any:
    """Images with the content of one box each turned."""
    patches = fn.slice(images, numbers("box_anchors", ndim=1), numbers("box_shapes", ndim=1), axes=[0, 1])
    angles = fn.external_source(name="angles", dtype=types.FLOAT, ndim=0)
    patches = fn.rotate(patches, angle=angles, interp_type=types.INTERP_NN, keep_size=True)
    return fn.multi_paste(
        images, patches, out_anchors=numbers("pastes", ndim=2), output_size=numbers("paste_size", ndim=1)
    )


def _cut(graph: Graph, device: str) -> Any:
    """The windows of the samples: (h, w, 3) uint8 of any size."""
    anchors, shapes = (None, None) if graph.window == "whole" else (numbers("anchors", 1), numbers("shapes", 1))
    if graph.encoded:
        files = fn.external_source(name="samples", dtype=types.UINT8, ndim=1)
        if graph.window == "inside":
            return decode(files, device, (anchors, shapes))
        images = decode(files, device)
    else:
        images = fn.external_source(name="samples", dtype=types.UINT8, ndim=3, layout="HWC")
        images = images.gpu() if device == "gpu" else images
    if graph.window == "whole":
        return images
    policy = "pad" if graph.window == "pads" else "error"
    return fn.slice(images, anchors, shapes, axes=[0, 1], out_of_bounds_policy=policy, fill_values=0)
