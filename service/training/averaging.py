"""Averages gradients over the workers while the backward pass still runs.

DeepSpeed without ZeRO copies all gradients into one new buffer when the backward pass is over, averages that, and
copies it back. Here each gradient is copied once, while it is warm, into a buffer that stays, and becomes a view of it;
a bucket is averaged, by DeepSpeed's own function, as soon as it is full and in the same order on every worker.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

# Large enough that a bucket is worth a message, small enough that the last one, which nothing hides, is short.
BUCKET_NUMEL = 2_000_000


class Averager:
    """Hooks on `parameters` that fill buckets and average those that are full.

    Args:
        parameters: in the order of the forward pass, so that the buckets fill from the last.
        average: averages a 1-D float tensor over all workers, in place.
        bucket_numel: elements after which a bucket is closed.
    """

    def __init__(
        self, parameters: list[nn.Parameter], average: Callable[[Tensor], Any], bucket_numel: int = BUCKET_NUMEL
    ) -> None:
        self._average = average
        self._buckets = _partition(parameters[::-1], bucket_numel)
        self.flats = [_empty(bucket) for bucket in self._buckets]
        self._views: dict[nn.Parameter, Tensor] = {}
        for bucket, flat in zip(self._buckets, self.flats, strict=True):
            self._views |= _views(bucket, flat)
        self._bucket_of = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}
        self._boundary = False
        self._ready: set[nn.Parameter] = set()
        self._missing = [len(bucket) for bucket in self._buckets]
        self._launched = 0
        # On a CPU a thread lets the messages travel beside the computation; on a GPU a stream of its own does.
        self._thread: ThreadPoolExecutor | None = None
        self._stream: Any = None
        if self.flats[0].is_cuda:
            self._stream = torch.cuda.Stream(self.flats[0].device)
        else:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="averaging")
        self._pending: list[Future[Any]] = []
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._collect) for parameter in parameters]

    def begin(self, boundary: bool) -> None:
        """Call it before a backward pass; `boundary` for the last one before an optimizer step."""
        self._boundary = boundary
        self._ready.clear()
        self._missing = [len(bucket) for bucket in self._buckets]
        self._launched = 0

    @torch.no_grad()
    def finish(self) -> None:
        """Call it after the last backward pass: now all gradients are averages. What had none gets zeros."""
        for parameter, view in self._views.items():
            if parameter not in self._ready:
                if parameter.grad is None:
                    view.zero_()
                    parameter.grad = view
                self._mark(parameter)
        assert self._launched == len(self._buckets)
        for future in self._pending:
            future.result()
        self._pending.clear()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def close(self) -> None:
        """Remove the hooks and end the thread."""
        for hook in self._hooks:
            hook.remove()
        if self._thread is not None:
            self._thread.shutdown()

    @torch.no_grad()
    def _collect(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        view, gradient = self._views[parameter], parameter.grad
        if gradient is not None and gradient.data_ptr() != view.data_ptr():
            view.copy_(gradient)
            parameter.grad = view
        if self._boundary:
            self._mark(parameter)

    def _mark(self, parameter: nn.Parameter) -> None:
        self._ready.add(parameter)
        self._missing[self._bucket_of[parameter]] -= 1
        while self._launched < len(self._buckets) and self._missing[self._launched] == 0:
            self._launch(self.flats[self._launched])
            self._launched += 1

    def _launch(self, flat: Tensor) -> None:
        if self._thread is not None:
            self._pending.append(self._thread.submit(self._average, flat))
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._average(flat)


def _partition(parameters: list[nn.Parameter], numel: int) -> list[list[nn.Parameter]]:
    """Consecutive buckets of one dtype and device, each closed when it holds `numel` elements or more."""
    buckets: list[list[nn.Parameter]] = []
    held = numel
    for parameter in parameters:
        if held >= numel or (parameter.dtype, parameter.device) != (buckets[-1][0].dtype, buckets[-1][0].device):
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += parameter.numel()
    return buckets


def _empty(bucket: list[nn.Parameter]) -> Tensor:
    numel = sum(parameter.numel() for parameter in bucket)
    return torch.zeros(numel, dtype=bucket[0].dtype, device=bucket[0].device)


def _views(bucket: list[nn.Parameter], flat: Tensor) -> dict[nn.Parameter, Tensor]:
    """A part of `flat` for each parameter, with the parameter's own strides: optimizers want both alike."""
    views, offset = {}, 0
    for parameter in bucket:
        views[parameter] = flat.as_strided(parameter.shape, parameter.stride(), offset)
        offset += parameter.numel()
    return views
