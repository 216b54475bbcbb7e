"""What can be chosen; the defaults are the authors' R50-FPN 1x configuration, for images of 800 x 1333 px."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from service.models.detections import Channels, Count, Probability

NUM_LEVELS = 5

_Grids = Annotated[tuple[Annotated[int, Field(ge=1, le=512)], ...], Field(min_length=NUM_LEVELS, max_length=NUM_LEVELS)]
_Size = Annotated[float, Field(ge=0, le=1_000_000)]
_Ranges = Annotated[tuple[tuple[_Size, _Size], ...], Field(min_length=NUM_LEVELS, max_length=NUM_LEVELS)]
_Weight = Annotated[float, Field(ge=0, le=1000)]


@dataclass(frozen=True)
class Options:
    """Everything but trunk and classes.

    Attributes:
        trainable_layers: stages of the trunk that learn, from the last one down.
        frozen_batchnorm: keep statistics, scale and shift of the trunk's BatchNorm.
        fpn_channels: channels of the pyramid.
        head_channels: channels of the towers of the class and the kernel branch.
        head_convs: 3 x 3 convolutions in each tower.
        mask_channels: channels of the mask branch inside.
        kernel_channels: channels of the unified mask features, and so the length of a 1 x 1 kernel.
        grids: cells along a side, level by level.
        scale_ranges: least and greatest sqrt(width * height) of a box, in pixels, that a level learns; both inclusive.
        centre_sigma: the share of a box, around the mask's centre of mass, whose cells answer for the object.
        mask_weight: of the dice loss beside the focal loss.
        focal_alpha: weight of the positives in the focal loss.
        focal_gamma: how much the focal loss leaves out what is easy.
        score_thresh: lower class scores are no candidates.
        mask_thresh: probability over which a pixel belongs to the mask.
        max_candidates: best class scores whose masks are drawn: a bound on memory, no published value, seldom reached.
        nms_pre: best candidates that go into the matrix NMS.
        nms_sigma: of its Gaussian: exp(-sigma * IoU^2).
        update_thresh: lower scores after the matrix NMS are no detections.
        max_per_image: best detections kept.
    """

    trainable_layers: Annotated[int, Field(ge=0)] = 3
    frozen_batchnorm: bool = True
    fpn_channels: Channels = 256
    head_channels: Channels = 512
    head_convs: Annotated[int, Field(ge=1, le=32)] = 4
    mask_channels: Channels = 128
    kernel_channels: Channels = 256
    grids: _Grids = (40, 36, 24, 16, 12)
    scale_ranges: _Ranges = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    centre_sigma: Probability = 0.2
    mask_weight: _Weight = 3.0
    focal_alpha: Probability = 0.25
    focal_gamma: _Weight = 2.0
    score_thresh: Probability = 0.1
    mask_thresh: Probability = 0.5
    max_candidates: Count = 1000
    nms_pre: Count = 500
    nms_sigma: _Weight = 2.0
    update_thresh: Probability = 0.05
    max_per_image: Count = 100

    def __post_init__(self) -> None:
        for least, greatest in self.scale_ranges:
            if least > greatest:
                raise ValueError(f"scale_ranges: {least} to {greatest} px is no range; the least size comes first")
