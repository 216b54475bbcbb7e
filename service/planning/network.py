"""What one forwarded image costs: operations, memory traffic, kept activations. Counted on torch's meta device.

Nothing is computed and no weight is held: torch says which operators run and on what shapes. The counts hold for any
network that `service.models` builds, so that a new one needs no table here.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from service import check
from service.config import ModelConfig

# Operators that touch no element: they make another view of the same memory, or none at all.
_FREE = frozenset(
    ("alias", "as_strided", "detach", "empty", "expand", "permute", "squeeze", "t", "transpose", "unsqueeze", "view")
)
# Per-image figures are the difference of two batches, which leaves out what a step costs once.
_BATCHES = (2, 4)


@dataclass(frozen=True)
class Network:
    """A network at one size of its input; all but the first two per forwarded image.

    Attributes:
        parameters: elements, all of them trained.
        buffers: elements of BatchNorm's running statistics.
        forward_flops: operations of a forward pass, of convolutions and linear layers; a multiply-add counts as two.
        training_flops: of a forward and a backward pass.
        traffic: elements that all operators of both passes read and write, each tensor once for each operator.
        activation_bytes: kept for the backward pass, in float32.
    """

    parameters: int
    buffers: int
    forward_flops: float
    training_flops: float
    traffic: float
    activation_bytes: int


@cache
def count(model: ModelConfig, classes: int, pretext_labels: int, size: int) -> Network:
    """Count the network at an input of (3, size, size)."""
    network = check.network(model, classes, pretext_labels)
    few, many = (_passes(network, images, size) for images in _BATCHES)
    forward, training, traffic = (
        (more - less) / (_BATCHES[1] - _BATCHES[0]) for less, more in zip(few, many, strict=True)
    )
    return Network(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        buffers=sum(buffer.numel() for buffer in network.buffers() if buffer.is_floating_point()),
        forward_flops=forward,
        training_flops=training,
        traffic=traffic,
        activation_bytes=check.activation_bytes(network, size),
    )


def _passes(network: Any, images: int, size: int) -> tuple[float, float, float]:
    """(forward operations, operations of both passes, elements touched) of a batch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    batch = torch.empty(images, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        network.train()(batch)
    # Gradients of an earlier batch would be added to, which is traffic of its own.
    network.zero_grad(set_to_none=True)
    traffic = _traffic_mode()
    with FlopCounterMode(display=False) as both, traffic:
        outputs = network(batch)
        total = outputs.logits.sum()
        if outputs.pretext_logits is not None:
            total = total + outputs.pretext_logits.sum()
        total.backward()
    return float(forward.get_total_flops()), float(both.get_total_flops()), float(traffic.elements)


def _traffic_mode() -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Traffic(TorchDispatchMode):
        """Adds up the elements of every operator's tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.elements = 0

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = operator(*args, **(kwargs or {}))
            if operator.overloadpacket.__name__ not in _FREE:
                leaves = tree_leaves((args, kwargs, result))
                touched = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
                self.elements += sum(tensor.numel() for tensor in touched.values())
            return result

    return Traffic()
