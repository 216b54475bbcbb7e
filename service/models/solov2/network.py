"""SOLOv2 as a detector."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.instances import Instances
from service.models import pyramid
from service.models.detections import Detections, Detector
from service.models.heads import Classifier
from service.models.solov2.assignment import assign, quarter_masks
from service.models.solov2.branches import GridHead, MaskBranch, to_head_strides
from service.models.solov2.decoding import decode
from service.models.solov2.losses import class_loss, mask_loss
from service.models.solov2.options import NUM_LEVELS, Options
from service.models.solov2.suppression import points_nms

# Of the levels as the head sees them.
_STRIDES = (8, 8, 16, 32, 32)


class _Predictions(NamedTuple):
    logits: list[Tensor]  # each (N, num_classes, S, S)
    kernels: Tensor  # (N, C, E)
    features: Tensor  # (N, E, H / 4, W / 4)


class SOLOv2(Detector):
    """The trunk's pyramid P2 .. P6, a head over the grids and a branch of mask features; losses are float32."""

    def __init__(self, trunk: Classifier, num_classes: int, options: Options) -> None:
        super().__init__()
        self.options = options
        self.backbone = pyramid.build(
            trunk,
            finest=4,
            num_levels=NUM_LEVELS,
            channels=options.fpn_channels,
            coarser="subsampled",
            trainable_layers=options.trainable_layers,
            frozen_batchnorm=options.frozen_batchnorm,
        )
        self.grid_head = GridHead(
            options.fpn_channels, options.head_channels, options.head_convs, num_classes, options.kernel_channels
        )
        self.mask_branch = MaskBranch(options.fpn_channels, options.mask_channels, options.kernel_channels)

    def losses(self, images: Tensor, sizes: Tensor, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Focal loss of the classes and `mask_weight` x dice loss of the masks."""
        for target in targets:
            if len(target.masks) != len(target.boxes):
                raise ValueError(
                    f"SOLOv2 learns from masks; an image has {len(target.boxes)} objects and {len(target.masks)} "
                    "masks; open the data with masks"
                )
        logits, kernels, features = self._predict(images)
        options, size = self.options, (images.shape[2], images.shape[3])
        assignments = [
            assign(target, size, options.grids, options.scale_ranges, options.centre_sigma) for target in targets
        ]
        masks = [quarter_masks(target.masks, size) for target in targets]
        with torch.autocast(images.device.type, enabled=False):
            classes = class_loss(
                torch.cat([_by_cell(level.float()) for level in logits], dim=1),
                torch.stack([assigned.labels for assigned in assignments]),
                options.focal_alpha,
                options.focal_gamma,
            )
            dice = mask_loss(kernels.float(), features.float(), assignments, masks)
        return {"loss": classes + options.mask_weight * dice, "class_loss": classes, "mask_loss": dice}

    def detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """Points NMS, masks of what is left, matrix NMS, the best of each image."""
        logits, kernels, features = self._predict(images)
        scores = torch.cat([_by_cell(points_nms(level.float().sigmoid())) for level in logits], dim=1)
        strides = torch.cat(
            [
                torch.full((grid * grid,), stride, device=images.device)
                for grid, stride in zip(self.options.grids, _STRIDES, strict=True)
            ]
        )
        with torch.autocast(images.device.type, enabled=False):
            return [
                decode(score, kernel.float(), maps.float(), strides, (height, width), self.options)
                for score, kernel, maps, (height, width) in zip(scores, kernels, features, sizes.tolist(), strict=True)
            ]

    def _predict(self, images: Tensor) -> _Predictions:
        height, width = images.shape[2:]
        if height % 32 or width % 32:
            raise ValueError(f"images of {height} x {width} px; SOLOv2 needs sides that are multiples of 32, padded")
        levels = list(self.backbone(images).values())
        pairs = [
            self.grid_head(maps, grid) for maps, grid in zip(to_head_strides(levels), self.options.grids, strict=True)
        ]
        kernels = torch.cat([_by_cell(kernel) for _, kernel in pairs], dim=1)
        return _Predictions([logits for logits, _ in pairs], kernels, self.mask_branch(levels[:4]))


def _by_cell(maps: Tensor) -> Tensor:
    """(N, C, S, S) -> (N, S * S, C)."""
    return maps.flatten(2).transpose(1, 2)
