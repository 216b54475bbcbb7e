"""Localization scores over the whole grid of CAM thresholds and IoU thresholds, added up batch by batch.

Three counts, all with the CAM of the true class and its box's IoU with the true box that fits best:
GT-known asks for the box alone; top-1 (top-5) localization asks, besides, that the true class is the first (among the
first five) predicted. Where top-1 is right the predicted class is the true class, so one map an image serves all.
MaxBoxAcc is GT-known at the CAM threshold that serves it best (Choe et al., "Evaluating Weakly Supervised Object
Localization Methods Right", CVPR 2020); its second version is the mean over the IoU thresholds 0.3, 0.5 and 0.7, each
with its own best CAM threshold.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

CAM_THRESHOLDS = np.round(np.arange(1, 20) * 0.05, 2)
IOU_THRESHOLDS = np.round(np.arange(3, 10) * 0.1, 1)
CENTRE_SHARES = np.round(np.arange(1, 21) * 0.05, 2)
# The columns of table 9 of the LoRot paper.
READ_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
# "we first segment the regions of which the value is above 20% of the max value of the CAM" (Zhou et al. 2016, 3.2).
ZHOU_CAM_THRESHOLD = 0.2

Axis = Literal["cam", "iou"]


@dataclass(frozen=True)
class Scores:
    """Fractions 0..1 of `num_located` images, unless said.

    Attributes:
        num_images: images seen.
        num_located: those of them with at least one true box; the rest count in `top1` and `top5` only.
        top1, top5: classification accuracy over `num_images`.
        gt_known, top1_loc, top5_loc: (T, I), CAM thresholds by IoU thresholds.
        centre_gt_known, centre_top1_loc: (K, I), the same for a box in the middle of every image that covers the
            share CENTRE_SHARES[k] of both its sides.
    """

    num_images: int
    num_located: int
    top1: float
    top5: float
    gt_known: np.ndarray
    top1_loc: np.ndarray
    top5_loc: np.ndarray
    centre_gt_known: np.ndarray
    centre_top1_loc: np.ndarray

    @property
    def best_cam_threshold(self) -> float:
        """The CAM threshold with the highest GT-known at IoU 0.5; the lowest of several."""
        return float(CAM_THRESHOLDS[int(self.gt_known[:, column(0.5)].argmax())])

    @property
    def max_box_acc(self) -> float:
        """Highest GT-known at IoU 0.5 over the CAM thresholds."""
        return float(self.gt_known[:, column(0.5)].max())

    @property
    def max_box_acc_v2(self) -> float:
        """Mean over IoU 0.3, 0.5 and 0.7 of the highest GT-known over the CAM thresholds."""
        return float(np.mean([self.gt_known[:, column(iou)].max() for iou in (0.3, 0.5, 0.7)]))

    @property
    def centre_share(self) -> float:
        """The share of the sides with which the centre box scores best at IoU 0.5, on these very images."""
        return float(CENTRE_SHARES[int(self.centre_gt_known[:, column(0.5)].argmax())])

    @property
    def centre_box_acc(self) -> float:
        """GT-known of the best centre box at IoU 0.5: what is reached without looking. MaxBoxAcc's counterpart."""
        return float(self.centre_gt_known[:, column(0.5)].max())

    def along(self, axis: Axis, cam_threshold: float | None = None) -> dict[str, tuple[float, ...]]:
        """One reading of table 9 at the thresholds 0.5, 0.6, 0.7, 0.8, 0.9.

        Args:
            axis: "cam": they are CAM thresholds, at IoU 0.5. "iou": they are IoU thresholds, at one CAM threshold.
            cam_threshold: that one; None for `best_cam_threshold`.

        Returns:
            Rows "top1_loc", "top5_loc", "gt_known", and for the axis "iou" also those of the centre box, best share at
            each.
        """
        if axis == "cam":
            at = [row(threshold) for threshold in READ_THRESHOLDS]
            names = ("top1_loc", "top5_loc", "gt_known")
            return {name: _floats(getattr(self, name)[at, column(0.5)]) for name in names}
        kept = row(self.best_cam_threshold if cam_threshold is None else cam_threshold)
        columns = [column(threshold) for threshold in READ_THRESHOLDS]
        return {
            "top1_loc": _floats(self.top1_loc[kept, columns]),
            "top5_loc": _floats(self.top5_loc[kept, columns]),
            "gt_known": _floats(self.gt_known[kept, columns]),
            "centre_top1_loc": _floats(self.centre_top1_loc[:, columns].max(axis=0)),
            "centre_gt_known": _floats(self.centre_gt_known[:, columns].max(axis=0)),
        }


@dataclass
class Tally:
    """Counts so far. Its size does not depend on how many images it has seen."""

    num_images: int = 0
    num_located: int = 0
    top1: int = 0
    top5: int = 0
    gt_known: np.ndarray = field(default_factory=lambda: _counts(CAM_THRESHOLDS))
    top1_loc: np.ndarray = field(default_factory=lambda: _counts(CAM_THRESHOLDS))
    top5_loc: np.ndarray = field(default_factory=lambda: _counts(CAM_THRESHOLDS))
    centre_gt_known: np.ndarray = field(default_factory=lambda: _counts(CENTRE_SHARES))
    centre_top1_loc: np.ndarray = field(default_factory=lambda: _counts(CENTRE_SHARES))

    def add(
        self, top1: np.ndarray, top5: np.ndarray, located: np.ndarray, cam_iou: np.ndarray, centre_iou: np.ndarray
    ) -> None:
        """Count N images.

        Args:
            top1, top5: (N,) bool, the true class is the first, is among the first five predicted.
            located: (N,) bool, the image has a true box.
            cam_iou: (N, T) IoU of the boxes at CAM_THRESHOLDS. centre_iou: (N, K) at CENTRE_SHARES.
        """
        self.num_images += len(top1)
        self.num_located += int(located.sum())
        self.top1 += int(top1.sum())
        self.top5 += int(top5.sum())
        hits = (cam_iou[:, :, None] >= IOU_THRESHOLDS) & located[:, None, None]
        self.gt_known += hits.sum(axis=0)
        self.top1_loc += hits[top1].sum(axis=0)
        self.top5_loc += hits[top5].sum(axis=0)
        centre_hits = (centre_iou[:, :, None] >= IOU_THRESHOLDS) & located[:, None, None]
        self.centre_gt_known += centre_hits.sum(axis=0)
        self.centre_top1_loc += centre_hits[top1].sum(axis=0)

    def scores(self) -> Scores:
        """The fractions; without a single image, or true box, they are 0."""
        images, located = max(self.num_images, 1), max(self.num_located, 1)
        return Scores(
            num_images=self.num_images,
            num_located=self.num_located,
            top1=self.top1 / images,
            top5=self.top5 / images,
            gt_known=self.gt_known / located,
            top1_loc=self.top1_loc / located,
            top5_loc=self.top5_loc / located,
            centre_gt_known=self.centre_gt_known / located,
            centre_top1_loc=self.centre_top1_loc / located,
        )


def row(cam_threshold: float) -> int:
    """Where a CAM threshold stands in the grid; raises ValueError if it does not."""
    return _index(CAM_THRESHOLDS, cam_threshold, "CAM")


def column(iou_threshold: float) -> int:
    """Where an IoU threshold stands in the grid; raises ValueError if it does not."""
    return _index(IOU_THRESHOLDS, iou_threshold, "IoU")


def _index(grid: np.ndarray, value: float, name: str) -> int:
    found = np.flatnonzero(np.isclose(grid, value))
    if len(found) == 0:
        raise ValueError(f"{name} threshold {value} is not in the grid; it has {', '.join(f'{v:g}' for v in grid)}")
    return int(found[0])


def _counts(rows: np.ndarray) -> np.ndarray:
    return np.zeros((len(rows), len(IOU_THRESHOLDS)), np.int64)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
