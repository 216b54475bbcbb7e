"""RetinaNet (Lin et al. 2017, https://arxiv.org/abs/1708.02002): torchvision's, over one of our trunks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection import retinanet as torchvision_retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from pipelines.instances import Instances
from service.models import pyramid
from service.models.detections import Channels, Count, Detections, Detector, Probability
from service.models.heads import Classifier


@dataclass(frozen=True)
class Options:
    """Everything but trunk and classes; the defaults are torchvision's `retinanet_resnet50_fpn`.

    Attributes:
        trainable_layers: stages of the trunk that learn, from the last one down.
        frozen_batchnorm: keep statistics, scale and shift of the trunk's BatchNorm.
        fpn_channels: channels of the pyramid and of both heads.
        anchor_sizes: sides in pixels of each level's smallest square anchors, from stride 8 on; 2^(1/3) and 2^(2/3) of
            them are there too, each in three shapes.
        fg_iou_thresh: an anchor is an object's from this IoU on.
        bg_iou_thresh: an anchor is background below it.
        score_thresh: lower scores are no detections.
        topk_candidates: best scores kept of each level before the NMS.
        nms_thresh: IoU over which the lower of two detections of one class goes.
        detections_per_img: best kept after the NMS.
    """

    trainable_layers: Annotated[int, Field(ge=0)] = 3
    frozen_batchnorm: bool = True
    fpn_channels: Channels = 256
    anchor_sizes: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)] = (32, 64, 128, 256, 512)
    fg_iou_thresh: Probability = 0.5
    bg_iou_thresh: Probability = 0.4
    score_thresh: Probability = 0.05
    topk_candidates: Count = 1000
    nms_thresh: Probability = 0.5
    detections_per_img: Count = 300

    def __post_init__(self) -> None:
        if self.bg_iou_thresh > self.fg_iou_thresh:
            raise ValueError(f"bg_iou_thresh {self.bg_iou_thresh} is more than fg_iou_thresh {self.fg_iou_thresh}")


class RetinaNet(Detector, torchvision_retinanet.RetinaNet):
    """torchvision's network, matching, losses and post-processing; batches come padded and normalised instead of as a
    list of raw images, and the arithmetic on boxes stays float32 under autocast.

    Over a torchvision ResNet its state dict has the keys and shapes of torchvision's RetinaNet, but for BatchNorm's
    `num_batches_tracked` where BatchNorm is frozen.
    """

    # torchvision's, for the type checker.
    backbone: nn.Module
    head: nn.Module
    anchor_generator: Any
    compute_loss: Callable[..., dict[str, Tensor]]
    postprocess_detections: Callable[..., list[dict[str, Tensor]]]

    def __init__(self, trunk: Classifier, num_classes: int, options: Options) -> None:
        backbone = pyramid.build(
            trunk,
            finest=8,
            num_levels=len(options.anchor_sizes),
            channels=options.fpn_channels,
            coarser="convolved",
            trainable_layers=options.trainable_layers,
            frozen_batchnorm=options.frozen_batchnorm,
        )
        sizes = tuple((size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in options.anchor_sizes)
        super().__init__(
            backbone,
            num_classes,
            anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            fg_iou_thresh=options.fg_iou_thresh,
            bg_iou_thresh=options.bg_iou_thresh,
            score_thresh=options.score_thresh,
            topk_candidates=options.topk_candidates,
            nms_thresh=options.nms_thresh,
            detections_per_img=options.detections_per_img,
        )
        # It would resize and normalise once more.
        del self.transform

    def losses(self, images: Tensor, sizes: Tensor, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Focal loss and L1 of boxes, each divided by an image's number of anchors on objects; means over images."""
        outputs, anchors, _ = self._predict(images, sizes)
        wanted = [{"boxes": target.boxes, "labels": target.labels} for target in targets]
        with torch.autocast(images.device.type, enabled=False):
            parts = self.compute_loss(wanted, outputs, anchors)
        class_loss, box_loss = parts["classification"], parts["bbox_regression"]
        return {"loss": class_loss + box_loss, "class_loss": class_loss, "box_loss": box_loss}

    def detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """Best anchors of each level, decoded, clipped to the content, and thinned out class by class."""
        outputs, anchors, counts = self._predict(images, sizes)
        with torch.autocast(images.device.type, enabled=False):
            found = self.postprocess_detections(
                {name: list(output.split(counts, dim=1)) for name, output in outputs.items()},
                [list(boxes.split(counts)) for boxes in anchors],
                [(height, width) for height, width in sizes.tolist()],
            )
        return [Detections(each["boxes"], each["scores"], each["labels"], None) for each in found]

    def _predict(self, images: Tensor, sizes: Tensor) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """float32 outputs of both heads (N, A, ...), N x anchors (A, 4), and the share of each level in A."""
        levels = list(self.backbone(images).values())
        outputs = {name: output.float() for name, output in self.head(levels).items()}
        # Anchors take the dtype of the maps; half precision would round them to several pixels.
        shapes = [torch.empty((), device=images.device).expand(level.shape) for level in levels]
        anchors = self.anchor_generator(ImageList(images, [(0, 0)] * len(sizes)), shapes)
        per_place = self.anchor_generator.num_anchors_per_location()
        counts = [level.shape[2] * level.shape[3] * count for level, count in zip(levels, per_place, strict=True)]
        return outputs, anchors, counts
