"""Exponential moving average of weights and buffers, which evaluation and the registered model use."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Ema:
    """torch's AveragedModel, floating-point buffers (BatchNorm's statistics) included, updated every few steps.

    The first update copies the model; from then on average = decay * average + (1 - decay) * model. Whole-number
    buffers (BatchNorm's count of batches) have no meaningful average and are the model's own.

    Args:
        model: the plain network, with whole parameters (no ZeRO 3), neither compiled nor wrapped. It is copied.
        decay: share of the old average that an update keeps.
        every: optimizer steps between two updates.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1) -> None:
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self._averaged.requires_grad_(False)
        self._every = every

    @property
    def module(self) -> nn.Module:
        """The averaged network. Put it in evaluation mode before use; its weights are live, not a copy."""
        return self._averaged.module

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` optimizer steps (counted from 1), if this step is one of every `every`."""
        if step % self._every:
            return
        self._averaged.update_parameters(model)
        for average, current in zip(self.module.buffers(), model.buffers(), strict=True):
            if not average.is_floating_point():
                average.copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, by name: the averaged network's as `module.*`, and `n_averaged`, the number of updates."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`'s result; raises RuntimeError that names keys or shapes that do not fit."""
        self._averaged.load_state_dict(state)

    @staticmethod
    def weights_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The averaged network's tensors, by its own names, from `state_dict()`'s result."""
        prefix = "module."
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
