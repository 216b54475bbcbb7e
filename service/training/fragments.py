"""Where the pieces of each parameter lie that this worker's optimizer holds, for every ZeRO stage in one form."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from service.training import distributed
from service.training.distributed import World


@dataclass(frozen=True)
class Fragment:
    """A piece of one parameter inside a tensor that the optimizer steps.

    Attributes:
        flat: the tensor the optimizer knows: the parameter itself without ZeRO, else a partition of many parameters.
        start: where the piece begins in `flat`, in elements.
        offset: where it begins in the parameter.
        numel: its length; 0 if this worker holds nothing of the parameter.
        shape: of the whole parameter.
        is_whole: the optimizer steps the parameter itself.
    """

    flat: Tensor
    start: int
    offset: int
    numel: int
    shape: torch.Size
    is_whole: bool

    @property
    def numel_whole(self) -> int:
        """Elements of the whole parameter."""
        return self.shape.numel()

    @torch.no_grad()
    def whole(self, source: Tensor) -> Tensor:
        """The parameter's part of `source`, a tensor laid out like `flat`, put together from all workers.

        Exact to the bit: the pieces are added as integers, and all but one worker add 0.
        """
        if self.is_whole:
            return source.detach()
        buffer = torch.zeros(self.numel_whole, dtype=source.dtype, device=source.device)
        buffer[self.offset : self.offset + self.numel] = source[self.start : self.start + self.numel]
        assert source.dtype == torch.float32
        distributed.all_sum(buffer.view(torch.int32))
        return buffer.view(self.shape)

    @torch.no_grad()
    def put(self, target: Tensor, value: Tensor) -> None:
        """Write this worker's piece of the whole `value` into `target`, a tensor laid out like `flat`."""
        if self.is_whole:
            target.copy_(value.view(self.shape))
            return
        piece = value.reshape(-1)[self.offset : self.offset + self.numel]
        target[self.start : self.start + self.numel] = piece.to(target.device)


def fragments(module: nn.Module, optimizer: Any, zero_stage: int, world: World) -> Iterator[tuple[str, Fragment]]:
    """(name, fragment) of every trained parameter, in the same order on all workers.

    Args:
        module: as DeepSpeed left it.
        optimizer: DeepSpeed's, with the given ZeRO stage.
    """
    groups = optimizer.bit16_groups if zero_stage in (1, 2) else []
    group_of = {parameter: index for index, group in enumerate(groups) for parameter in group}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if zero_stage == 0:
            yield name, Fragment(parameter, 0, 0, parameter.numel(), parameter.shape, True)
        elif zero_stage == 3:
            yield name, _of_stage_3(parameter, optimizer, world)
        else:
            flat = optimizer.single_partition_of_fp32_groups[group_of[parameter]]
            yield name, _of_stage_1_and_2(parameter, flat)


def _of_stage_1_and_2(parameter: nn.Parameter, flat: Tensor) -> Fragment:
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return Fragment(flat, 0, 0, 0, parameter.shape, False)
    start, offset = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
    return Fragment(flat, start, offset, mapping.hp_fragment_address.numel, parameter.shape, False)


def _of_stage_3(parameter: nn.Parameter, optimizer: Any, world: World) -> Fragment:
    held: Any = parameter
    group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    # Every worker holds as much; what lies beyond the parameter's end is padding.
    offset = min(length * world.rank, held.ds_numel)
    numel = min(length, held.ds_numel - offset)
    return Fragment(optimizer.fp32_partitioned_groups_flat[group], start, offset, numel, held.ds_shape, False)


@torch.no_grad()
def put_partition(parameter: Tensor, part: Fragment, value: Tensor) -> None:
    """Make the whole `value` that of a parameter which ZeRO 3 has cut: this worker's piece, and what it holds of it.

    The optimizer's own copy is another tensor, `part.flat`.
    """
    held: Any = parameter
    piece = value.reshape(-1)[part.offset : part.offset + part.numel]
    held.ds_tensor.data[: part.numel] = piece.to(held.ds_tensor.device)
    if parameter.numel() == part.numel_whole:
        # Small ones stay whole on every worker.
        parameter.copy_(value)
