"""Batches through a DALI pipeline: built once, fed by the loader, handed to torch without a copy."""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from nvidia.dali import Pipeline

from pipelines.dali import device_graph, instance_graph
from pipelines.dali.graph import Graph
from pipelines.dali.instance_graph import InstanceGraph
from pipelines.soundness import UnsoundError


class Way(Protocol):
    """A module that knows one kind of graph: how it is built, fed and read.

    Attributes:
        ASIDE: names of prepared values that no operator takes; `finish` gets them back.
    """

    ASIDE: tuple[str, ...]

    def outline(self, graph: Any, device: str) -> Any:
        """The graph's outputs, inside a pipeline."""
        ...

    def prepare(self, graph: Any, plan: Any, samples: list[np.ndarray]) -> dict[str, Any]:
        """The graph's inputs for one batch, the samples among them."""
        ...

    def finish(self, graph: Any, outputs: Any, aside: dict[str, Any]) -> Any:
        """What a renderer hands out, of a batch's outputs."""
        ...


def way_of(graph: Graph | InstanceGraph, on_host: bool) -> Way:
    """The module for a graph, rendered by the host's compiled operator if there is one for it and `on_host`."""
    if isinstance(graph, InstanceGraph):
        return instance_graph
    if on_host:
        # Only here: Numba takes half a second to import, and a GPU's worker does not need it.
        from pipelines.dali import host_graph

        return host_graph
    return device_graph


def build(
    graph: Graph | InstanceGraph,
    *,
    device: str = "cpu",
    stock: bool = False,
    device_id: int | None = None,
    batch_size: int,
    num_threads: int,
    prefetch: int = 2,
) -> Pipeline:
    """The pipeline, not yet built: a GPU graph can be made and serialised where there is no GPU.

    Args:
        device: "cpu" or "gpu".
        stock: on the CPU too, the graph of stock operators.
        device_id: the GPU; None on a CPU.

    Returns:
        A pipeline with the outputs that `Renderer` reads, first of all the images, and the inputs that it feeds.
    """
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    with pipeline:
        outputs = way_of(graph, on_host=device != "gpu" and not stock).outline(graph, device)
        pipeline.set_outputs(*(outputs if isinstance(outputs, tuple) else (outputs,)))
    return pipeline


class Renderer:
    """Renders batches in the order they were submitted, `depth` of them at a time.

    A rendered batch owns its memory: it stays valid for as long as somebody holds the tensor.
    """

    def __init__(
        self,
        graph: Graph | InstanceGraph,
        *,
        device: str,
        batch_size: int,
        num_threads: int,
        depth: int,
        stock: bool = False,
    ) -> None:
        """`stock` renders by stock operators on a CPU too, as a GPU does."""
        self.graph = graph
        self.depth = depth
        self._stock = stock
        self._device = torch.device(device)
        on_gpu = self._device.type == "cuda"
        self._way = way_of(graph, on_host=not (on_gpu or stock))
        self._pipeline: Any = build(
            graph,
            device="gpu" if on_gpu else "cpu",
            stock=stock,
            device_id=(self._device.index or 0) if on_gpu else None,
            batch_size=batch_size,
            num_threads=num_threads,
            prefetch=depth,
        )
        self._pipeline.build()
        self._waiting = 0
        self._started = False
        # DALI reads the samples where they lie, so they must outlive its turn.
        self._held: deque[Any] = deque()

    @property
    def ready(self) -> bool:
        """Whether `collect` has something to wait for: DALI starts with `depth` batches at once."""
        return self._started

    def prepare(self, samples: Sequence[bytes | np.ndarray], plan: Any) -> dict[str, Any]:
        """What `submit` takes, of one batch of files (bytes) or pixels (H, W, 3); any thread may call it."""
        given = [np.frombuffer(sample, np.uint8) if isinstance(sample, bytes) else sample for sample in samples]
        return self._way.prepare(self.graph, plan, given)

    def submit(self, inputs: dict[str, Any]) -> None:
        """Hand in one prepared batch; rendering starts when the first `depth` are in."""
        aside = {name: inputs[name] for name in self._way.ASIDE}
        for name, values in inputs.items():
            if name not in aside:
                self._pipeline.feed_input(name, values)
        self._held.append((inputs["samples"], aside))
        self._waiting += 1
        if self._started or self._waiting == self.depth:
            self._pipeline.schedule_run()
            self._started = True

    def collect(self) -> Any:
        """The oldest batch submitted, views of DALI's own memory.

        Returns:
            (N, 3, size, size) channels_last for a `Graph`, `rendered.Rendered` for an `InstanceGraph`.

        Raises:
            UnsoundError: a sample cannot be decoded. The renderer is of no more use; `fault` tells which it was.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            outputs = self._pipeline.outputs(stream)
        except RuntimeError as error:
            raise UnsoundError(str(error)) from None
        _, aside = self._held.popleft()
        return self._way.finish(self.graph, outputs, aside)

    def fault(self, sample: bytes | np.ndarray, plan: Any) -> str | None:
        """Why DALI cannot render one sample, of which `plan` is the one row; None if it can."""
        device = str(self._device)
        single = Renderer(self.graph, device=device, batch_size=1, num_threads=1, depth=1, stock=self._stock)
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
        self._held.clear()
