"""DeepSpeed's configuration, derived from the job's and merged with what the user gives under `deepspeed:`."""

from collections.abc import Mapping
from typing import Any

import torch

from service.config import TrainingConfig, accumulation_steps
from service.errors import ConfigError

# A bucket is allocated anew in every backward pass: DeepSpeed's default of 5e8 elements would be 2 GB.
_MAX_BUCKET = 25_000_000
_MAX_BUCKET_CPU = 4_000_000

# Where DeepSpeed's configuration and the job's speak about the same thing; then what may not be set at all, with what
# to use instead.
_OWNED = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "global_batch, micro_batch and the number of workers",
    "gradient_clipping": "clip_norm",
    "zero_optimization.stage": "zero_stage",
    "torch_autocast.enabled": "precision",
    "torch_autocast.dtype": "precision",
}
_FOREIGN = {
    "optimizer": "optimizer.name, optimizer.lr, ...",
    "scheduler": "schedule.name, schedule.warmup, ...",
    "fp16": "precision=fp16, which keeps fp32 weights under torch's autocast",
    "bf16": "precision=bf16, which keeps fp32 weights under torch's autocast",
    "bfloat16": "precision=bf16, which keeps fp32 weights under torch's autocast",
    "amp": "precision=fp16 or precision=bf16",
    "elasticity": "global_batch and micro_batch, which hold at any number of workers",
    "managed_gradient_accumulation": "global_batch and micro_batch",
    "gradient_predivide_factor": "nothing: gradients are averaged in fp32",
    "prescale_gradients": "nothing: gradients are averaged in fp32",
    "data_efficiency": "the data block",
    "curriculum_learning": "the data block",
}


def autocast_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """What convolutions and linear layers compute in; None for float32 throughout.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "auto":
        # On a CPU bf16 convolutions were measured 15 times slower than fp32.
        return torch.bfloat16 if has_bf16 else None
    if config.precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ConfigError("precision: this GPU has no bf16; use precision=fp16 or precision=fp32")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]


def is_channels_last(config: TrainingConfig, device: torch.device) -> bool:
    """Whether weights and images are to lie in NHWC order.

    Not on a CPU if the input's shape changes: there the backward pass of a 1 x 1 convolution with stride 2 over 4 or 8
    channels was seen to write beyond its buffers (torch 2.14.1, oneDNN), and the process dies of it sooner or later.
    """
    return config.channels_last and not (device.type == "cpu" and config.input_varies)


def settings(config: TrainingConfig, *, world_size: int, num_parameters: int, device: torch.device) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Raises:
        ConfigError: `config.deepspeed` contradicts the job's own keys, sets what the job decides, or the batch does not
            divide.
    """
    dtype = autocast_dtype(config, device)
    on_gpu = device.type == "cuda"
    ours: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        # Left out, DeepSpeed clips to 1.
        "gradient_clipping": config.clip_norm or 0.0,
        "torch_autocast": {"enabled": dtype is not None},
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": on_gpu,
            "reduce_bucket_size": min(num_parameters, _MAX_BUCKET if on_gpu else _MAX_BUCKET_CPU),
        },
        "zero_allow_untested_optimizer": True,
        # It waits for the GPU at every step.
        "timers": {"throughput": {"enabled": False}},
    }
    if dtype is not None:
        ours["torch_autocast"]["dtype"] = str(dtype).removeprefix("torch.")
    problems = _contradictions(ours, config.deepspeed)
    if problems:
        raise ConfigError("deepspeed:\n" + "\n".join(f"  {problem}" for problem in problems))
    return _merge(ours, config.deepspeed)


def _contradictions(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    problems = [f"{key}: is not for here; use {instead}" for key, instead in _FOREIGN.items() if key in theirs]
    problems += [
        f"{key}: {theirs[key]!r} stands for a block of keys; write the block, or leave it out"
        for key, value in ours.items()
        if isinstance(value, Mapping) and key in theirs and not isinstance(theirs[key], Mapping)
    ]
    for key, source in _OWNED.items():
        given = _at(theirs, key)
        decided = _at(ours, key)
        if given is None or given == decided or given == "auto":
            continue
        problems.append(f"{key}: {given!r} contradicts {decided!r}, which follows from {source}; leave it out")
    return problems


def _at(values: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    return values


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`theirs` on top of `ours`; DeepSpeed's `auto`, which would be derived, leaves ours."""
    merged = dict(ours)
    for key, value in theirs.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(below, value)
        elif value != "auto":
            merged[key] = value
    return merged
