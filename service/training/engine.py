"""The network inside DeepSpeed, which owns the optimizer step, gradient averaging, accumulation, clipping and ZeRO.

The only module that imports DeepSpeed (0.19.8 was read and tested), and it does so late: its import takes seconds.
"""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from service.config import TrainingConfig, accumulation_steps
from service.errors import CheckpointError, ConfigError
from service.training import checkpoint, distributed, optimizers
from service.training.averaging import Averager
from service.training.distributed import World
from service.training.engine_settings import autocast_dtype, is_channels_last, settings
from service.training.fragments import Fragment, fragments, put_partition

_log = logging.getLogger(__name__)


class Engine:
    """A model being trained on this worker.

    Args:
        config: the job.
        model: with the weights to start from; it is moved to the device and, with ZeRO, its parameters are replaced by
            views or pieces. All workers get the main worker's weights.
        world: of this worker.

    Attributes:
        bad_gradient: 1.0 if the last step's averaged gradient was not finite, on the device; with fp16 always 0.0,
            since there it is how the loss scale finds its height.
        dropped: the last step's update was left out.

    Raises:
        ConfigError: settings that this machine, or DeepSpeed, cannot combine.
    """

    def __init__(self, config: TrainingConfig, model: nn.Module, world: World) -> None:
        self.world = world
        self.accumulation = accumulation_steps(config, world.size)
        self._dtype = autocast_dtype(config, world.device)
        self._zero = config.zero_stage
        if config.sync_batchnorm:
            model = _with_sync_batchnorm(model, world)
        deepspeed = _import_deepspeed(world.device)
        optimizer = optimizers.build(
            config.optimizer, optimizers.parameter_groups(model, config.optimizer.weight_decay)
        )
        numel = sum(parameter.numel() for parameter in model.parameters())
        given = settings(config, world_size=world.size, num_parameters=numel, device=world.device)
        try:
            self._deepspeed = deepspeed.initialize(model=model, optimizer=optimizer, config=given)[0]
        except (AssertionError, ValueError) as error:
            raise ConfigError(
                f"DeepSpeed does not accept these settings: {error}; see `deepspeed:` and zero_stage"
            ) from error
        self.module: nn.Module = self._deepspeed.module
        if is_channels_last(config, world.device) and self._zero == 0:
            # Only now: while it initialises, DeepSpeed needs contiguous parameters, and with ZeRO they are flat views.
            self.module.to(memory_format=torch.channels_last)
        if config.compile:
            self.module.compile()
        self._averager: Averager | None = None
        if self._zero == 0:
            self._deepspeed.enable_backward_allreduce = False
            if world.size > 1:
                trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
                self._averager = Averager(trained, self._average)
        self._scale = _LossScale(self._deepspeed.optimizer) if self._dtype == torch.float16 and self._zero else None
        self._buffers = [buffer for buffer in self.module.buffers() if buffer.is_floating_point()]
        self._all_buffers = list(self.module.buffers())
        self._kept: list[Tensor] = []
        self._gate = _Gate(self._deepspeed.basic_optimizer)
        self._micro_step = 0
        self.bad_gradient = torch.zeros((), device=world.device)
        self.dropped = False

    def __call__(self, *inputs: Any) -> Any:
        """The network's forward pass, under autocast if the precision asks for it."""
        return self._deepspeed(*inputs)

    def train(self, mode: bool = True) -> None:
        """Put the network in training mode, or in evaluation mode."""
        self.module.train(mode)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of training, for networks beside the engine's own, as the averaged one."""
        with torch.autocast(
            self.world.device.type, dtype=self._dtype or torch.bfloat16, enabled=self._dtype is not None
        ):
            yield

    def backward(self, loss: Tensor) -> None:
        """Backward pass of one micro-batch's mean loss; gradients of a step's micro-batches are averaged."""
        self._micro_step += 1
        boundary = self._micro_step == self.accumulation
        if self._averager is not None:
            self._averager.begin(boundary)
        self._deepspeed.backward(loss)
        if not boundary:
            # It counts micro-batches by these calls, and steps at the last one only.
            self._deepspeed.step()

    def keep_buffers(self) -> None:
        """Remember the buffers (BatchNorm's statistics) as they are, for a step that may be left out."""
        self._kept = [buffer.detach().clone() for buffer in self._all_buffers]

    def step(self, rate: float, measure: bool = False, spoilt: Tensor | None = None) -> float:
        """Optimizer step at learning rate `rate`, after `accumulation` calls of `backward`.

        Args:
            measure: return the gradient's norm.
            spoilt: 1.0 if this worker's losses are not finite, else 0.0. If given, and any worker's is 1.0 or the
                averaged gradient is not finite, no worker makes the update: weights and optimizer state stay, the
                buffers become what `keep_buffers` found. That waits for the device.

        Returns:
            The L2 norm of the averaged gradient before clipping if `measure`, which may cost time; else NaN.
        """
        assert self._micro_step == self.accumulation, "a step needs all of its micro-batches"
        self._micro_step = 0
        if self._averager is not None:
            self._averager.finish()
        fp16 = self._dtype == torch.float16
        looks = self._zero == 0 and not fp16
        self.bad_gradient = self._not_finite() if looks else torch.zeros((), device=self.world.device)
        spoils = spoilt is not None and bool(distributed.all_sum(torch.stack([spoilt, self.bad_gradient])).any())
        for group in self._deepspeed.basic_optimizer.param_groups:
            group["lr"] = rate
        norm = self._gradient_norm() if measure and self._zero == 0 else math.nan
        with self._gate.closed_if(spoils):
            self._deepspeed.step()
        if self._scale is not None:
            self._scale.update()
        if self._zero and not fp16:
            # DeepSpeed has looked already, on all workers, and made no update if it was so.
            self.bad_gradient = on_device([float(self._deepspeed.optimizer.overflow)], self.world.device)[0]
            spoils = spoils or (spoilt is not None and bool(self._deepspeed.optimizer.overflow))
        self.dropped = spoils
        if spoils:
            for buffer, kept in zip(self._all_buffers, self._kept, strict=True):
                buffer.copy_(kept)
        return float(self._deepspeed.get_global_grad_norm()) if measure and self._zero else norm

    def agree(self, values: Tensor, buffers: bool = True) -> Tensor:
        """Sums `values` over the workers and makes floating-point buffers (BatchNorm's statistics) their means.

        One message; each worker has gathered its own statistics, and from here on all have the same. Call it after
        every step. The result is not read here, because that would wait for a GPU.

        Args:
            buffers: False leaves them alone, where no step has moved them.
        """
        mine = values.to(self.world.device, torch.float32)
        if self.world.size == 1:
            return mine
        if not buffers:
            return distributed.all_sum(mine.clone())
        sizes = [buffer.numel() for buffer in self._buffers]
        flat = distributed.all_sum(
            torch.cat([mine, *(buffer.detach().reshape(-1).float() for buffer in self._buffers)])
        )
        sums, means = flat[: len(values)], flat[len(values) :] / self.world.size
        for buffer, mean in zip(self._buffers, means.split(sizes), strict=True):
            buffer.copy_(mean.view_as(buffer))
        return sums

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, whole, float32, views of live memory. Every worker must call it."""
        state = {name: tensor.detach() for name, tensor in self.module.state_dict().items()}
        if self._zero == 3:
            state |= {name: self._whole(part, None) for name, part in self._fragments()}
        return state

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `weights()`'s result, of any ZeRO stage and world size; every worker must call it.

        Raises:
            CheckpointError: it is another model's; names what differs.
        """
        parts = dict(self._fragments())
        live = dict(self.module.state_dict(keep_vars=True))
        shapes = {name: tuple(parts[name].shape if name in parts else value.shape) for name, value in live.items()}
        checkpoint.check_fit("the state to go on from", state, shapes)
        for name, value in live.items():
            part = parts.get(name)
            if part is not None and not part.is_whole:
                # What the optimizer steps, apart from what the network computes with.
                part.put(part.flat, state[name])
            if self._zero == 3 and part is not None:
                put_partition(value, part, state[name])
            else:
                value.copy_(state[name])

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `KEY.PARAMETER`, whole, whatever ZeRO stage and world size keep them apart.

        Every worker must call it; only the main one needs to keep the result. Empty before the first step.
        """
        states = self._deepspeed.basic_optimizer.state
        found = {}
        for name, part in self._fragments():
            for key, value in states.get(part.flat, {}).items():
                if isinstance(value, Tensor):
                    found[f"{key}.{name}"] = self._whole(part, key) if value.shape == part.flat.shape else value
        return found

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `optimizer_state()`'s result, of any ZeRO stage and world size.

        Raises:
            CheckpointError: it is another model's; names what is missing or does not fit. That it is this optimizer's
                is for the caller to know.
        """
        keys = sorted({name.partition(".")[0] for name in state})
        fused = bool(self._deepspeed.basic_optimizer.defaults.get("fused"))
        problems = []
        for name, part in self._fragments():
            held = self._deepspeed.basic_optimizer.state[part.flat]
            for key in [key for key, value in held.items() if isinstance(value, Tensor) and key not in keys]:
                # Of steps that this state has not done.
                del held[key]
            for key in keys:
                value = state.get(f"{key}.{name}")
                if value is None or (value.ndim and value.numel() != part.numel_whole):
                    shape = "missing" if value is None else f"{tuple(value.shape)}, needs {part.numel_whole} elements"
                    problems.append(f"{key}.{name}: {shape}")
                elif value.ndim == 0:
                    # Fused kernels keep the step count beside the parameter, others on the host.
                    held[key] = value.to(part.flat.device) if fused else value.clone()
                else:
                    part.put(held.setdefault(key, torch.zeros_like(part.flat)), value)
        if problems:
            raise CheckpointError("the optimizer's state does not fit this model:\n  " + "\n  ".join(problems))

    def scale_state(self) -> dict[str, float]:
        """The loss scale of fp16 and its history; empty for other precisions."""
        scaler = self._deepspeed.torch_autocast_z0_gradscaler
        if scaler is not None:
            return dict(scaler.state_dict())
        return self._scale.state() if self._scale is not None else {}

    def load_scale_state(self, state: Mapping[str, float]) -> None:
        """Continue from `scale_state()`'s result; one of another precision is left alone."""
        scaler = self._deepspeed.torch_autocast_z0_gradscaler
        if not state:
            return
        if scaler is not None:
            scaler.load_state_dict(scaler.state_dict() | dict(state))
        elif self._scale is not None:
            self._scale.load(state)

    def close(self) -> None:
        """End threads and free DeepSpeed's buffers."""
        if self._averager is not None:
            self._averager.close()
        self._deepspeed.destroy()

    def _average(self, flat: Tensor) -> None:
        self._deepspeed.buffered_allreduce_fallback(grads=[flat])

    def _fragments(self) -> Iterator[tuple[str, Fragment]]:
        return fragments(self.module, self._deepspeed.optimizer, self._zero, self.world)

    def _whole(self, part: Fragment, key: str | None) -> Tensor:
        source = part.flat if key is None else self._deepspeed.basic_optimizer.state[part.flat][key]
        return part.whole(source)

    def _gradients(self) -> list[Tensor]:
        if self._averager is not None:
            return self._averager.flats
        return [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]

    def _not_finite(self) -> Tensor:
        # The largest value, not a sum, which could overflow where no gradient has.
        largest = torch.stack(list(torch._foreach_norm(self._gradients(), ord=math.inf)))
        return (~torch.isfinite(largest)).any().float()

    def _gradient_norm(self) -> float:
        norm = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(self._gradients()))))
        scaler = self._deepspeed.torch_autocast_z0_gradscaler
        return float(norm) / (scaler.get_scale() if scaler is not None else 1.0)


class _Gate:
    """Lets DeepSpeed go through the motions of a step, counters and gradient buffers included, without the update."""

    def __init__(self, optimizer: Any) -> None:
        self._closed = False
        step = optimizer.step

        @functools.wraps(step)
        def gated(*args: Any, **options: Any) -> Any:
            return None if self._closed else step(*args, **options)

        optimizer.step = gated

    @contextlib.contextmanager
    def closed_if(self, closed: bool) -> Iterator[None]:
        self._closed = closed
        try:
            yield
        finally:
            self._closed = False


class _LossScale:
    """The dynamic loss scale of fp16 with ZeRO 1, 2 and 3.

    DeepSpeed 0.19.8 puts a GradScaler there that never hears of an overflow, because `step()` returns before it, and
    compares the scaled norm with the clipping threshold. Its `override_loss_scale` does both right, so the scale is
    kept here, by torch.amp.GradScaler's rule: halved after an overflow, doubled after 2000 steps without one.
    """

    def __init__(self, optimizer: Any, scale: float = 65536.0, interval: int = 2000) -> None:
        self._optimizer = optimizer
        self._interval = interval
        optimizer.torch_autocast_gradscaler = None
        self._set(scale, 0)

    def update(self) -> None:
        """Call it after every optimizer step."""
        if bool(self._optimizer.overflow):
            self._set(self._value / 2, 0)
        elif self._good + 1 == self._interval:
            self._set(self._value * 2, 0)
        else:
            self._good += 1

    def state(self) -> dict[str, float]:
        return {"scale": self._value, "_growth_tracker": self._good}

    def load(self, state: Mapping[str, float]) -> None:
        self._set(float(state["scale"]), int(state.get("_growth_tracker", 0)))

    def _set(self, value: float, good: int) -> None:
        self._value, self._good = value, good
        self._optimizer.override_loss_scale(value)


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host as (len(values),) float32 on `device`, without waiting for it.

    `torch.tensor` copies from pageable memory, for which the host waits until a GPU has done all it was given; a fill
    takes its number along.
    """
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # It would compile a shared-memory operator that serves inference only: seconds, and a compiler.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def _with_sync_batchnorm(model: nn.Module, world: World) -> nn.Module:
    if world.device.type != "cuda":
        raise ConfigError("sync_batchnorm: torch has it for GPUs only; leave it false on a CPU")
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted
