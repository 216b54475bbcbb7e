"""Writing behind training's back: a copy of the state in host memory, and a thread that takes it to the disk."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from service.errors import LorotError, StorageError

_log = logging.getLogger(__name__)

# Where a tensor begins in its buffer: a cache line, and a multiple of every element's width.
_ALIGNED_BYTES = 64


class HostCopy:
    """Host memory for a copy of the state, allocated once and filled anew for every checkpoint.

    Args:
        pinned: whether the memory is locked, so that a GPU copies to it at the full speed of its bus.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._slots: dict[str, _Slots] = {}

    @torch.no_grad()
    def take(self, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies of all tensors, by part and name, which stay as they are until the next call.

        Tensors that share memory are copied one by one; each keeps its memory format, so that copying is moving bytes.
        When it returns, the originals may change.
        """
        on_gpu = False
        for part, tensors in parts.items():
            layout = {name: _layout(tensor) for name, tensor in tensors.items()}
            if part not in self._slots or self._slots[part].layout != layout:
                self._slots.pop(part, None)
                self._slots[part] = _Slots.of(tensors, layout, self._pinned)
            for name, tensor in tensors.items():
                self._slots[part].tensors[name].copy_(tensor, non_blocking=True)
                on_gpu |= tensor.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return {part: dict(self._slots[part].tensors) for part in parts}


@dataclass(frozen=True)
class _Slots:
    """The place of each tensor of a part, in one piece of memory."""

    layout: dict[str, tuple[object, ...]]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], layout: dict[str, tuple[object, ...]], pinned: bool) -> "_Slots":
        starts, end = {}, 0
        for name, tensor in tensors.items():
            starts[name] = end
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNED_BYTES) * _ALIGNED_BYTES
        memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        slots = {}
        for name, tensor in tensors.items():
            flat = memory[starts[name] : starts[name] + tensor.numel() * tensor.element_size()].view(tensor.dtype)
            # What torch gives a tensor like it: the same strides, unless it has holes or covers itself.
            strides = torch.empty_like(tensor, device="meta").stride()
            slots[name] = flat.as_strided(tensor.shape, strides)
        return cls(layout, slots)


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


class Writer:
    """Runs one action at a time on a thread of its own. The process does not end before it, unless it is killed."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: LorotError | None = None
        self.took_s = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether an action is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether an action has failed, and nobody has waited for it since."""
        return self._failure is not None

    def start(self, action: Callable[[], object]) -> None:
        """Begin an action; the one before has ended and was waited for."""
        assert not self.is_busy
        assert self._failure is None
        self._thread = threading.Thread(target=self._run, args=(action,), name="writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is under way; raises what the action raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, action: Callable[[], object]) -> None:
        began = time.monotonic()
        try:
            action()
        except LorotError as error:
            self._failure = error
        except BaseException as error:
            _log.exception("writing failed")
            self._failure = StorageError(f"unexpected {type(error).__name__} while writing: {error}")
        self.took_s = time.monotonic() - began
