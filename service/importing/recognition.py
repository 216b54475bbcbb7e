"""From the names and shapes of foreign tensors to a network of ours and its weights.

Known are torchvision's names, which timm's ResNets share, and those of LoRot's published checkpoints: torchvision's
behind `module.`, and `fc2` for the pretext head. All other names are ours.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor

from pipelines import pretext
from service import bundle, models
from service.config import ModelConfig
from service.errors import CheckpointError, ConfigError

NETWORKS: tuple[str, ...] = get_args(ModelConfig.model_fields["name"].annotation)
# What wraps a network puts its own name in front of all others: DataParallel, torch.compile, a trainer.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "network.")
_HEADS = {"fc2.": "pretext_fc."}
# Counts batches in training; older files lack it, and no output depends on it.
_COUNTER = ".num_batches_tracked"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Recognised:
    """A network and its weights, by our names, float32, on the CPU.

    Attributes:
        notes: what was changed on the way, for the user.
    """

    model: ModelConfig
    weights: dict[str, Tensor]
    num_classes: int
    num_pretext: int
    notes: tuple[str, ...]


def recognise(tensors: Mapping[str, Tensor], source: str, network: str | None = None) -> Recognised:
    """The network that these are the weights of.

    Args:
        tensors: as `checkpoint_file.read` gives them.
        network: its name; default: the one whose names and shapes fit.

    Raises:
        ConfigError: no such network.
        CheckpointError: names or shapes of none, or not of this one, fit (which differ); a weight is not finite.
    """
    if network is not None and network not in NETWORKS:
        raise ConfigError(f"--model {network}: there is no such network; there are {', '.join(NETWORKS)}")
    weights, notes = _renamed(tensors)
    head = weights.get("fc.weight")
    if head is None or head.ndim != 2:
        shown = ", ".join(list(weights)[-6:])
        raise CheckpointError(
            f"{source}: no classifier: fc.weight of (classes, channels) is wanted, and the last names there are {shown}"
            "; a whole classifier would work, of " + ", ".join(NETWORKS)
        )
    second = weights.get("pretext_fc.weight")
    num_classes, num_pretext = len(head), len(second) if second is not None and second.ndim == 2 else 0
    candidates = [_configured(name, weights) for name in ([network] if network else NETWORKS)]
    shapes = [_shapes(config.name, config.width, num_classes, num_pretext) for config in candidates]
    found = max(range(len(shapes)), key=lambda place: _agreement(shapes[place], weights))
    config, expected = candidates[found], shapes[found]
    missing = [name for name in expected if name.endswith(_COUNTER) and name not in weights]
    if missing:
        notes.append(f"{len(missing)} counters of batches (num_batches_tracked) are not in the file and start at 0")
        weights |= {name: torch.zeros((), dtype=torch.int64) for name in missing}
    weights = {name: _plain(value) for name, value in weights.items()}
    try:
        bundle.check_fit(expected, weights, f"{source}: {'as' if network else 'taken for the nearest,'} {config.name}")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nnetworks that would work: {', '.join(NETWORKS)}; --model chooses one"
        ) from None
    _check_finite(weights, source)
    return Recognised(config, weights, num_classes, num_pretext, tuple(notes))


def pretext_of(num_pretext: int, name: str | None, source: str) -> tuple[str, dict[str, Any]]:
    """The pretext task and its options that a head of so many outputs was trained for.

    Args:
        name: the task; default: none for 0, lorot_i for 4 (rotation has as many), lorot_e for 4 a cell of a grid.

    Raises:
        ConfigError: that task has another number of labels.
    """
    side = round((num_pretext / 4) ** 0.5)
    on_grid = num_pretext > 4 and 4 * side * side == num_pretext
    usual = {0: "none", 4: "lorot_i"}.get(num_pretext, "lorot_e" if on_grid else "")
    chosen = name or usual
    if not chosen:
        raise ConfigError(
            f"{source}: a pretext head of {num_pretext} outputs is of no task known here; --pretext none leaves it out"
        )
    options: dict[str, Any] = {"grid": side} if chosen == "lorot_e" and on_grid and side != 2 else {}
    labels = pretext.load(chosen, **options).num_labels
    if labels != num_pretext and chosen != "none":
        raise ConfigError(
            f"{source}: --pretext {chosen} has {labels} labels, the file's pretext head {num_pretext} outputs; "
            f"--pretext {usual or 'none'} would work"
        )
    return chosen, options


def _renamed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    weights, notes = dict(tensors), []
    while prefix := next((part for part in _WRAPPERS if all(name.startswith(part) for name in weights)), ""):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
        notes.append(f"{prefix!r} before every name is left out")
    for theirs, ours in _HEADS.items():
        if f"{theirs}weight" in weights and f"{ours}weight" not in weights:
            renamed = {name: name.replace(theirs, ours, 1) if name.startswith(theirs) else name for name in weights}
            weights = {renamed[name]: value for name, value in weights.items()}
            notes.append(f"{theirs}* is the pretext head, {ours}*")
    halves = sorted({str(value.dtype) for value in weights.values() if value.dtype in _FLOATS} - {"torch.float32"})
    if halves:
        notes.append(f"{' and '.join(halves)} weights become float32")
    return weights, notes


def _configured(name: str, weights: Mapping[str, Tensor]) -> ModelConfig:
    stem = weights.get("conv1.weight")
    # resnet_small's first layer has half of its width.
    if name == "resnet_small" and stem is not None and stem.ndim == 4 and len(stem) >= 4:
        return ModelConfig(name="resnet_small", width=2 * len(stem))
    return ModelConfig.model_validate({"name": name})


@functools.lru_cache(maxsize=64)
def _shapes(name: str, width: int, num_classes: int, num_pretext: int) -> Mapping[str, Tensor]:
    """The network's state on the meta device: names, shapes and types without memory."""
    config = ModelConfig.model_validate({"name": name, "width": width})
    with torch.device("meta"):
        return MappingProxyType(models.build(config, num_classes, num_pretext).state_dict())


def _agreement(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> int:
    """How many tensors fit, less those of the network that have nothing to fill them."""
    fitting = sum(name in weights and weights[name].shape == value.shape for name, value in expected.items())
    counters = sum(name.endswith(_COUNTER) and name not in weights for name in expected)
    return 2 * fitting + counters - len(expected)


def _plain(value: Tensor) -> Tensor:
    """Dense, float32 or int64, with memory of its own; what cannot be is left for `check_fit` to name."""
    if value.layout is not torch.strided:
        return value
    if value.dtype in _FLOATS:
        return value.detach().to(torch.float32).contiguous()
    if value.dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        return value.detach().to(torch.int64)
    return value.detach()


def _check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    sparse = [name for name, value in weights.items() if value.layout is not torch.strided]
    if sparse:
        raise CheckpointError(f"{source}: {sparse[0]} is {weights[sparse[0]].layout}; dense weights would work")
    broken = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise CheckpointError(
            f"{source}: {broken[0]}{more} has values that are not finite; an earlier checkpoint may not"
        )
