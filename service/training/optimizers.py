"""Optimizers by name: SGD with momentum, AdamW (torch's own both), and LAMB.

LAMB is written here because the packages in use bring none for CPU and GPU: DeepSpeed's is a CUDA kernel.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from service.config import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of convolutions and linear layers with weight decay; biases and norms, the vectors, without.

    Only what requires a gradient; a group that would be empty is left out. Call it before the engine wraps the model:
    ZeRO 3 flattens parameters.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build(config: OptimizerConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer `config` describes, on parameter groups that bring their own weight decay.

    sgd without momentum is plain gradient descent, with or without `nesterov`. lamb does not adapt groups of vectors
    (biases and norms) to their norm, as its authors' code does not: a bias that starts at 0 would hardly ever leave it.
    """
    if config.name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
    if config.name == "adamw":
        return AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    adapted = [{**group, "adapt": any(parameter.ndim > 1 for parameter in group["params"])} for group in groups]
    return Lamb(adapted, lr=config.lr, betas=config.betas)


class Lamb(Optimizer):
    """Layer-wise adaptive moments for large batches (You et al. 2020, https://arxiv.org/abs/1904.00962, algorithm 2).

    phi is the identity; where a layer's norm or its update's is 0 the ratio is 1. Each parameter tensor is a layer, so
    parameters must not be cut or flattened (ZeRO 0 only). No transfer from the GPU waits in a step.

    Args:
        params: parameters or groups. A group's `adapt` False leaves out the layer-wise ratio: AdamW's update.
        lr: learning rate.
        betas: decay rates of both moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, inside the norm of the update.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; returns what `closure`, if given, does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state(parameter) for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        firsts, seconds = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        for state in states:
            state["step"] += 1
        steps = [int(state["step"]) for state in states]
        torch._foreach_lerp_(firsts, gradients, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
        divisors = torch._foreach_div(seconds, [1 - beta2**step for step in steps])
        torch._foreach_sqrt_(divisors)
        torch._foreach_add_(divisors, group["eps"])
        updates = torch._foreach_div(firsts, [1 - beta1**step for step in steps])
        torch._foreach_div_(updates, divisors)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        if group["adapt"]:
            weight_norms = torch.stack(list(torch._foreach_norm(parameters)))
            update_norms = torch.stack(list(torch._foreach_norm(updates)))
            ratios = torch.where((weight_norms > 0) & (update_norms > 0), weight_norms / update_norms, 1.0)
            torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            # On the CPU, as torch's own optimizers keep it: reading it must not wait for the GPU.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
