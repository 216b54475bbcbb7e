"""The networks of SOLOv2 over the pyramid (section 3.2 and figure 2 of the paper)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def coordinates(maps: Tensor) -> Tensor:
    """The place of each pixel, for CoordConv: (N, C, h, w) -> (N, 2, h, w) float32, x then y, from -1 to 1."""
    N, _, h, w = maps.shape
    x = torch.linspace(-1, 1, w, device=maps.device).expand(N, 1, h, w)
    y = torch.linspace(-1, 1, h, device=maps.device)[:, None].expand(N, 1, h, w)
    return torch.cat([x, y], dim=1)


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, pixel centres at half integers: (N, C, h, w) -> (N, C, *size)."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def to_head_strides(levels: Sequence[Tensor]) -> list[Tensor]:
    """P2 .. P6 (strides 4, 8, 16, 32, 64) at strides 8, 8, 16, 32, 32."""
    finest, *between, coarsest = levels
    halved = resize(finest, [side // 2 for side in finest.shape[2:]])
    return [halved, *between, resize(coarsest, between[-1].shape[2:])]


def convolve_dynamically(kernels: Tensor, features: Tensor) -> Tensor:
    """One 1 x 1 convolution per object: kernels (P, E), features (E, h, w) -> mask logits (P, h, w)."""
    return (kernels @ features.flatten(1)).unflatten(1, features.shape[1:])


class GridHead(nn.Module):
    """Class logits and a kernel for each cell; one set of weights for all levels."""

    def __init__(self, num_in: int, num_hidden: int, num_convs: int, num_classes: int, kernel_channels: int) -> None:
        super().__init__()
        self.kernel_tower = _tower(num_in + 2, num_hidden, num_convs)
        self.kernels = nn.Conv2d(num_hidden, kernel_channels, kernel_size=3, padding=1)
        self.class_tower = _tower(num_in, num_hidden, num_convs)
        self.classes = nn.Conv2d(num_hidden, num_classes, kernel_size=3, padding=1)
        _initialise(self)
        # Every class starts at a probability of 0.01, as the focal loss wants it.
        nn.init.constant_(self.classes.get_parameter("bias"), -math.log(99))

    def forward(self, maps: Tensor, grid: int) -> tuple[Tensor, Tensor]:
        """(N, C, h, w) -> logits (N, num_classes, grid, grid) and kernels (N, kernel_channels, grid, grid)."""
        cells = resize(torch.cat([maps, coordinates(maps)], dim=1), (grid, grid))
        kernels = self.kernels(self.kernel_tower(cells))
        return self.classes(self.class_tower(cells[:, :-2])), kernels


class MaskBranch(nn.Module):
    """P2 .. P5, brought step by step to P2's size, added up: the unified mask features. P5 knows its coordinates."""

    def __init__(self, num_in: int, num_hidden: int, num_out: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            _Path(num_in + 2 if level == 3 else num_in, num_hidden, max(1, level)) for level in range(4)
        )
        self.merge = _block(num_hidden, num_out, kernel_size=1)
        _initialise(self)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Four (N, C, h, w), each half the size of the one before -> (N, num_out, h, w) of the first one's size."""
        *finer, coarsest = levels
        inputs = [*finer, torch.cat([coarsest, coordinates(coarsest)], dim=1)]
        sizes = [level.shape[2:] for level in levels]
        steps = [sizes[:1], *(sizes[level - 1 :: -1] for level in (1, 2, 3))]
        brought = [path(maps, to) for path, maps, to in zip(self.paths, inputs, steps, strict=True)]
        return self.merge(sum(brought[1:], brought[0]))


class _Path(nn.Module):
    """Convolutions, after each of which the maps grow to the next finer level's size."""

    def __init__(self, num_in: int, num_hidden: int, num_steps: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_tower(num_in, num_hidden, num_steps))

    def forward(self, maps: Tensor, sizes: Sequence[torch.Size]) -> Tensor:
        for block, size in zip(self.blocks, sizes, strict=True):
            maps = block(maps)
            if maps.shape[2:] != size:
                maps = resize(maps, size)
        return maps


def _tower(num_in: int, num_hidden: int, num_convs: int) -> nn.Sequential:
    inputs = [num_in, *[num_hidden] * (num_convs - 1)]
    return nn.Sequential(*(_block(num, num_hidden, kernel_size=3) for num in inputs))


def _block(num_in: int, num_out: int, kernel_size: int) -> nn.Sequential:
    """Convolution, GroupNorm, ReLU. Of 32 groups, or in narrow networks of fewer, so that each has 4 channels."""
    num_groups = min(math.gcd(32, num_out), max(1, num_out // 4))
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, kernel_size, padding=kernel_size // 2, bias=False),
        nn.GroupNorm(num_groups, num_out),
        nn.ReLU(inplace=True),
    )


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=0.01)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
