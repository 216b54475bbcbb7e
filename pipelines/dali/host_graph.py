"""The graph of the host: DALI reads its inputs, decodes the windows, and one compiled operator does all the rest.

DALI's stock operators on a CPU cost twice the decoding, for each passes the whole batch through memory once more.
"""

from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.plugin.numba import NumbaFunction
from torch import Tensor

from pipelines.dali.graph import Graph, decode, images_of, numbers
from pipelines.kernels import render
from pipelines.kernels.excerpt import excerpts
from pipelines.plan import Plan, View

ASIDE: tuple[str, ...] = ()
_KINDS = {
    "float32": (render.FLOAT, types.FLOAT),
    "uint8": (render.BYTE, types.UINT8),
    "float16": (render.HALF, types.INT16),
    "bfloat16": (render.HALF, types.INT16),
}


class _Compiled(NumbaFunction):
    """DALI's Numba operator, given the addresses of functions that are compiled and kept already."""

    def _get_run_fn_cpu(self, run_fn: int, *rest: Any) -> int:
        return run_fn

    def _get_setup_fn_cpu(self, setup_fn: int) -> int:
        return setup_fn


def outline(graph: Graph, device: str) -> Any:
    """The graph's output (size, size, 3), inside a pipeline on the CPU; halves come out as 16-bit integers."""
    if graph.encoded:
        files = fn.external_source(name="samples", dtype=types.UINT8, ndim=1, no_copy=True)
        window = (numbers("anchors", ndim=1), numbers("shapes", ndim=1)) if graph.window == "inside" else None
        images = decode(files, "cpu", window)
    else:
        images = fn.external_source(name="samples", dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True)
    inputs = [images, numbers("numbers", ndim=1), fn.external_source(name="canvas", dtype=types.UINT8, ndim=1)]
    in_types, ndims = [types.UINT8, types.INT32, types.UINT8, types.INT32], [3, 1, 1, 1]
    inputs.append(types.Constant(_table(graph.view, graph.dtype), device="cpu"))
    run: Any = render.RUN
    if graph.slots:
        # Compiling it takes long, even if once only.
        from pipelines.kernels import augmented

        run = augmented.RUN
        inputs.append(fn.external_source(name="amounts", dtype=types.FLOAT, ndim=1))
        in_types.append(types.FLOAT)
        ndims.append(1)
    setup: Any = render.SETUP
    operator = _Compiled(
        run_fn=run,
        setup_fn=setup,
        out_types=[_KINDS[graph.dtype][1]],
        in_types=in_types,
        outs_ndim=[3],
        ins_ndim=ndims,
        device="cpu",
    )
    return operator(*inputs)


def prepare(graph: Graph, plan: Plan, samples: list[np.ndarray]) -> dict[str, Any]:
    """The graph's inputs for one batch."""
    count = len(plan.ids)
    inputs: dict[str, Any] = {"samples": samples, "canvas": np.zeros((count, plan.size), np.uint8)}
    table = np.empty((count, len(render.LAYOUT) + len(graph.slots)), np.int32)
    table[:, 0] = plan.flips if graph.flips else 0
    table[:, 1:5] = plan.windows
    if graph.encoded and graph.window == "inside":
        inputs["samples"], windows = excerpts(samples, plan.windows)
        inputs["anchors"], inputs["shapes"] = windows[:, :2].copy(), windows[:, 2:].copy()
        # Only the window is decoded, so that it begins at its own corner.
        table[:, 1:3] = 0
    table[:, 5:8] = plan.boxes
    table[:, 8] = plan.turns if graph.rotates else 0
    table[:, 9] = _KINDS[graph.dtype][0]
    if graph.slots:
        table[:, 10:] = plan.ops
        inputs["amounts"] = plan.amounts.reshape(count, -1).astype(np.float32)
    inputs["numbers"] = table
    return inputs


def finish(graph: Graph, outputs: Any, aside: dict[str, Any]) -> Tensor:
    """(N, 3, size, size), channels_last."""
    return images_of(outputs[0], graph.dtype)


def _table(view: View, dtype: str) -> np.ndarray:
    """What `kernels.render` calls `table`: (n,) int32."""
    mean, std = np.array(view.mean, np.float64) * 255, np.array(view.std, np.float64) * 255
    erased = np.rint(mean) if dtype == "uint8" else np.zeros(3)
    table = np.concatenate([1 / std, -mean / std, erased]).astype(np.float32).view(np.int32)
    if _KINDS[dtype][0] != render.HALF:
        return table
    values = (np.arange(256)[None, :] - mean[:, None]) / std[:, None]
    halves = torch.tensor(values, dtype=torch.float32).to(getattr(torch, dtype)).view(torch.int16).numpy()
    return np.concatenate([table, halves.reshape(-1).view(np.int32)])
