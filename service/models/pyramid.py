"""The feature pyramid over a classifier's trunk (Lin et al. 2017, https://arxiv.org/abs/1612.03144): torchvision's.

What is trained of the trunk follows torchvision's detection references: `trainable_layers` counts from the last stage
down, 3 leaves the stem and `layer1` of a ResNet as they are, and BatchNorm keeps both its statistics and its scale and
shift (FrozenBatchNorm2d), because a worker sees too few images at a time to estimate them. mmdetection, in which
SOLOv2 was published, freezes the same stages and all statistics, but goes on training scale and shift of the others.
"""

import copy
import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from service.errors import CheckpointError, ConfigError
from service.models.heads import Classifier

# A side that every stride in use divides.
_SIDE = 256


class Stage(NamedTuple):
    """Feature maps that a trunk offers: (N, channels, H / stride, W / stride) after the module `name`."""

    name: str
    channels: int
    stride: int

    def __str__(self) -> str:
        return f"{self.name} ({self.channels} channels at 1/{self.stride})"


def feature_stages(trunk: Classifier) -> list[Stage]:
    """The trunk's `layer1`, `layer2`, ... with their shapes, found by tracing shapes alone.

    Raises:
        CheckpointError: it has no such layers, or one does not take what the one before it gives.
    """
    shadow = copy.deepcopy(trunk).to("meta").eval()
    maps = torch.zeros(1, 3, _SIDE, _SIDE, device="meta")
    found = []
    for name, module in shadow.named_children():
        if name == "fc":
            break
        try:
            after = module(maps)
        except RuntimeError as error:
            raise CheckpointError(
                f"the trunk's {name} does not take maps of shape {tuple(maps.shape)}, which the layers before it make "
                f"of an image {_SIDE} px wide: {error}"
            ) from None
        maps = after
        if re.fullmatch(r"layer\d+", name):
            found.append(Stage(name, maps.shape[1], _SIDE // maps.shape[3]))
    if not found:
        names = ", ".join(name for name, _ in trunk.named_children())
        raise CheckpointError(
            f"the trunk has no stages layer1, layer2, ... to build a feature pyramid on; it has {names}"
        )
    return found


def build(
    trunk: Classifier,
    *,
    finest: int,
    num_levels: int,
    channels: int,
    coarser: Literal["convolved", "subsampled"],
    trainable_layers: int,
    frozen_batchnorm: bool,
) -> BackboneWithFPN:
    """Maps of `channels` at strides `finest`, 2 x `finest`, ...: a dict in this order, from a batch of images.

    Each level is built on the trunk's last stage of its stride. Above the trunk's coarsest, levels are made from the
    one below: `convolved` by a 3 x 3 of stride 2 (RetinaNet's P6 and P7), `subsampled` by taking every second pixel.
    For torchvision's ResNets modules and keys are those of torchvision's own detectors.

    Args:
        trunk: is copied.
        trainable_layers: stages that learn, from the last one down; one more than there are stages: the stem too.
        frozen_batchnorm: keep statistics, scale and shift of the trunk's BatchNorm.

    Raises:
        CheckpointError: the trunk has no maps of the finest stride.
        ConfigError: `trainable_layers` is out of range.
    """
    stages = feature_stages(trunk)
    # Of several stages of one stride the last one stays.
    by_stride = {stage.stride: stage for stage in stages}
    strides = [finest * 2**level for level in range(num_levels)]
    taken: list[Stage] = []
    for stride in strides:
        if stride not in by_stride:
            break
        taken.append(by_stride[stride])
    if not taken:
        raise CheckpointError(
            f"the trunk has no feature maps at 1/{finest} of the image, where the pyramid begins; it has "
            f"{', '.join(map(str, stages))}"
        )
    names = [f"p{int(math.log2(stride))}" for stride in strides[len(taken) :]]
    extra = _Convolved(names, channels) if coarser == "convolved" else _Subsampled(names)
    pyramid = BackboneWithFPN(
        copy.deepcopy(trunk),
        return_layers={stage.name: str(level) for level, stage in enumerate(taken)},
        in_channels_list=[stage.channels for stage in taken],
        out_channels=channels,
        extra_blocks=extra,
    )
    _freeze(pyramid.body, trainable_layers)
    if frozen_batchnorm:
        _freeze_batchnorm(pyramid.body)
    return pyramid


def _freeze(body: nn.Module, trainable_layers: int) -> None:
    """Leaves gradients to the last `trainable_layers` stages, and to the stem if that is more than there are."""
    layers = [name for name, _ in body.named_children() if re.fullmatch(r"layer\d+", name)][::-1]
    if not 0 <= trainable_layers <= len(layers) + 1:
        raise ConfigError(
            f"trainable_layers: {trainable_layers} is not in 0 .. {len(layers) + 1}: this pyramid stands on "
            f"{', '.join(reversed(layers))} and a stem"
        )
    learning = layers[:trainable_layers]
    for name, module in body.named_children():
        if name not in learning and trainable_layers <= len(layers):
            module.requires_grad_(False)


def _freeze_batchnorm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps).to(child.get_buffer("running_mean").device)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            _freeze_batchnorm(child)


class _Convolved(ExtraFPNBlock):
    """P6 = conv(P5), P7 = conv(relu(P6)), ... (Lin et al. 2017, https://arxiv.org/abs/1708.02002, footnote 2)."""

    def __init__(self, names: Sequence[str], channels: int) -> None:
        super().__init__()
        self.names = tuple(names)
        for name in names:
            convolution = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            nn.init.zeros_(convolution.get_parameter("bias"))
            self.add_module(name, convolution)

    def forward(self, levels: list[Tensor], _: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        maps = levels[-1]
        for index, name in enumerate(self.names):
            maps = getattr(self, name)(F.relu(maps) if index else maps)
            levels.append(maps)
        return levels, [*names, *self.names]


class _Subsampled(ExtraFPNBlock):
    """Each level is every second pixel of the one below, as torchvision's LastLevelMaxPool makes one."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def forward(self, levels: list[Tensor], _: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        for _name in self.names:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return levels, [*names, *self.names]
