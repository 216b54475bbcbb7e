"""The plan rendered by DALI: the only module that imports it.

The graph is made of stock operators and written once, with a `device`: on the CPU it decodes and resizes on threads of
its own, on a GPU it decodes there ("mixed"). Every choice comes in with the samples, none is drawn inside. Pixels are
8 bits until they are normalised, so that equal pixels stay equal and a turned box leaves no seam on a blank image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from pipelines.plan import Plan, View
from pipelines.soundness import UnsoundError


@dataclass(frozen=True)
class Graph:
    """What a graph has to do; operators for the rest are left out.

    Attributes:
        view: size, mean and std of the output.
        encoded: samples are image files, not pixels.
        window: "inside" the image, or one that "pads" (may reach over its edges), or "whole".
        resizes: windows are not all of the output's size.
        flips, rotates: some sample may be mirrored, some box may be turned.
    """

    view: View
    encoded: bool
    window: str
    resizes: bool
    flips: bool
    rotates: bool


def build(
    graph: Graph,
    *,
    device: str = "cpu",
    device_id: int | None = None,
    batch_size: int,
    num_threads: int,
    prefetch: int = 2,
) -> Pipeline:
    """The pipeline, not yet built: a GPU graph can be made and serialised where there is no GPU.

    Args:
        device: "cpu" or "gpu".
        device_id: the GPU; None on a CPU.

    Returns:
        A pipeline with one output, (N, size, size, 3) float32, and the inputs that `Renderer` feeds.
    """
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    with pipeline:
        images = _decode(graph, device)
        size = [graph.view.size, graph.view.size]
        if graph.resizes:
            images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        if graph.flips:
            images = fn.flip(images, horizontal=_number("flips", ndim=0))
        if graph.rotates:
            anchors = _number("box_anchors", ndim=1)
            patches = fn.slice(images, anchors, _number("box_shapes", ndim=1), axes=[0, 1])
            angles = fn.external_source(name="angles", dtype=types.FLOAT, ndim=0)
            patches = fn.rotate(patches, angle=angles, interp_type=types.INTERP_NN, keep_size=True)
            images = fn.multi_paste(images, patches, out_anchors=_number("pastes", ndim=2), output_size=size)
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=[255 * mean for mean in graph.view.mean],
            std=[255 * std for std in graph.view.std],
        )
        pipeline.set_outputs(images)
    return pipeline


def _decode(graph: Graph, device: str) -> Any:
    """The windows of the samples: (h, w, 3) uint8 of any size."""
    if not graph.encoded:
        images = fn.external_source(name="samples", dtype=types.UINT8, ndim=3, layout="HWC")
        return _cut(graph, images.gpu() if device == "gpu" else images)
    files = fn.external_source(name="samples", dtype=types.UINT8, ndim=1)
    # The orientation in the EXIF is not applied: windows are planned on the image as it is stored. The GPU's decoder
    # interpolates colours as the one on the CPU does.
    options: dict[str, Any] = {
        "device": "mixed" if device == "gpu" else "cpu",
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }
    if graph.window == "inside":
        return fn.decoders.image_slice(files, *_window(), axes=[0, 1], **options)
    return _cut(graph, fn.decoders.image(files, **options))


def _cut(graph: Graph, images: Any) -> Any:
    if graph.window == "whole":
        return images
    anchors, shapes = _window()
    policy = "pad" if graph.window == "pads" else "error"
    return fn.slice(images, anchors, shapes, axes=[0, 1], out_of_bounds_policy=policy, fill_values=0)


def _window() -> tuple[Any, Any]:
    return _number("anchors", ndim=1), _number("shapes", ndim=1)


def _number(name: str, ndim: int) -> Any:
    return fn.external_source(name=name, dtype=types.INT32, ndim=ndim)


class Renderer:
    """Renders batches in the order they were submitted, `depth` of them at a time.

    A rendered batch owns its memory: it stays valid for as long as somebody holds the tensor.
    """

    def __init__(self, graph: Graph, *, device: str, batch_size: int, num_threads: int, depth: int) -> None:
        self.graph = graph
        self.depth = depth
        self._device = torch.device(device)
        on_gpu = self._device.type == "cuda"
        self._pipeline: Any = build(
            graph,
            device="gpu" if on_gpu else "cpu",
            device_id=(self._device.index or 0) if on_gpu else None,
            batch_size=batch_size,
            num_threads=num_threads,
            prefetch=depth,
        )
        self._pipeline.build()
        self._waiting = 0
        self._started = False

    @property
    def ready(self) -> bool:
        """Whether `collect` has something to wait for: DALI starts with `depth` batches at once."""
        return self._started

    def prepare(self, samples: Sequence[np.ndarray], plan: Plan) -> dict[str, Any]:
        """The graph's inputs for one batch; any thread may call it."""
        inputs: dict[str, Any] = {"samples": list(samples)}
        if self.graph.window != "whole":
            inputs["anchors"] = plan.windows[:, :2].astype(np.int32)
            inputs["shapes"] = plan.windows[:, 2:].astype(np.int32)
        if self.graph.flips:
            inputs["flips"] = plan.flips.astype(np.int32)
        if self.graph.rotates:
            corners = plan.boxes[:, :2].astype(np.int32)
            inputs["box_anchors"] = corners
            inputs["box_shapes"] = np.repeat(plan.boxes[:, 2:], 2, axis=1).astype(np.int32)
            inputs["angles"] = (90 * plan.turns).astype(np.float32)
            # Two things are pasted: the image itself at its own corner, then the turned patch.
            inputs["pastes"] = np.stack([np.zeros_like(corners), corners], axis=1)
        return inputs

    def submit(self, inputs: dict[str, Any]) -> None:
        """Hand in one prepared batch; rendering starts when the first `depth` are in."""
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)
        self._waiting += 1
        if self._started or self._waiting == self.depth:
            self._pipeline.schedule_run()
            self._started = True

    def collect(self) -> Tensor:
        """The oldest batch submitted: (N, 3, size, size) float32, channels_last, a view of DALI's own memory.

        Raises:
            UnsoundError: a sample cannot be decoded. The renderer is of no more use; `fault` tells which it was.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (output,) = self._pipeline.outputs(stream)
        except RuntimeError as error:
            raise UnsoundError(str(error)) from None
        return torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)

    def fault(self, sample: np.ndarray, plan: Plan) -> str | None:
        """Why DALI cannot render one sample, of which `plan` is the one row; None if it can."""
        single = Renderer(self.graph, device=str(self._device), batch_size=1, num_threads=1, depth=1)
        try:
            single.submit(single.prepare([sample], plan))
            single.collect()
        except UnsoundError:
            return "the file is damaged: DALI cannot decode it"
        finally:
            single.close()
        return None

    def close(self) -> None:
        """Free the pipeline's threads and buffers, but not the batches that were handed out."""
        self._pipeline = None
