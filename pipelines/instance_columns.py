"""What a manifest holds of the single objects in its images: classes, crowds, areas and segmentations, all mapped.

They lie beside the boxes, one entry for each box, so that the objects of sample i are found by the boxes' offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.columns import view

_NAMES = ("instance_label", "instance_crowd", "instance_area", "instance_bbox", "instance_segmentation")
_NUMBERS = {"instance_label": np.int64, "instance_crowd": np.uint8, "instance_area": np.float64}


@dataclass(frozen=True)
class InstanceRows:
    """Columns over all K objects of a data set, in the order of its samples and, in each, of its boxes.

    Attributes:
        image_ids: (N,) int64, what the annotations call each sample.
        labels: (K,) int64 classes.
        crowd: (K,) bool, a group that stands for no single object.
        areas: (K,) float64 square pixels of the segmentation, by which COCO tells small from large.
        bboxes: (K, 4) float64 (x_min, y_min, width, height) as annotated, not clipped to the image.
        segmentations: K compressed run lengths (`pipelines.run_lengths`) over the source image; b"" without one.
    """

    image_ids: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    bboxes: np.ndarray
    segmentations: Sequence[bytes]


@dataclass(frozen=True)
class Objects:
    """The K objects of one sample, in source pixels; the arrays are views of the manifest's file where they can be.

    Attributes:
        boxes: (K, 4) float32 (x_min, y_min, x_max, y_max), half-open, inside the image; empty where nothing of the
            annotated box is.
        labels: (K,) int64. crowd: (K,) bool. areas: (K,) float64.
        bboxes: (K, 4) float64 (x_min, y_min, width, height) as annotated.
        segmentations: K compressed run lengths; b"" without one.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    bboxes: np.ndarray
    segmentations: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def visible(self) -> np.ndarray:
        """(K,) bool: the box is not empty. Others are nothing to learn, but count as missed in an evaluation."""
        return np.logical_and(self.boxes[:, 2] > self.boxes[:, 0], self.boxes[:, 3] > self.boxes[:, 1])

    def where(self, kept: np.ndarray) -> "Objects":
        """Those for which (K,) bool `kept` is true."""
        chosen = tuple(runs for runs, keep in zip(self.segmentations, kept.tolist(), strict=True) if keep)
        return Objects(
            self.boxes[kept], self.labels[kept], self.crowd[kept], self.areas[kept], self.bboxes[kept], chosen
        )


NOTHING = Objects(
    np.zeros((0, 4), np.float32),
    np.zeros(0, np.int64),
    np.zeros(0, bool),
    np.zeros(0, np.float64),
    np.zeros((0, 4), np.float64),
    (),
)


class InstanceTable:
    """The columns of an open manifest.

    Attributes:
        image_ids: (N,) int64, what the annotations call each sample.
        labels: (K,) int64 classes of all objects.
        has_segmentations: whether any object has a segmentation.
    """

    def __init__(self, batch: pa.RecordBatch, offsets: np.ndarray, boxes: np.ndarray) -> None:
        """`offsets` (N + 1,) and `boxes` (K, 4) are those of the manifest."""
        self.image_ids: np.ndarray = view(batch.column("image_id"))
        self._offsets, self._boxes = offsets, boxes
        label, crowd, area, bbox, segmentation = (batch.column(name).values for name in _NAMES)
        self.labels, self._crowd, self._areas = view(label), view(crowd), view(area)
        self._bboxes: np.ndarray = view(bbox.flatten()).reshape(-1, 4)
        self._segmentations = segmentation
        starts = np.frombuffer(segmentation.buffers()[1], np.int64)
        self.has_segmentations = bool(len(segmentation)) and bool(starts[len(segmentation)])

    def __len__(self) -> int:
        """Objects in all."""
        return len(self.labels)

    def of(self, sample: int) -> Objects:
        """The objects of one sample."""
        start, stop = int(self._offsets[int(sample)]), int(self._offsets[int(sample) + 1])
        own = slice(start, stop)
        return Objects(
            self._boxes[own],
            self.labels[own],
            self._crowd[own].astype(bool),
            self._areas[own],
            self._bboxes[own],
            tuple(self._segmentations.slice(start, stop - start).to_pylist()),
        )


def columns(rows: InstanceRows, offsets: np.ndarray) -> dict[str, pa.Array]:
    """What a manifest keeps of `rows`; `offsets` (N + 1,) int64 are those of its boxes.

    Raises:
        ValueError: the columns are not as long as the boxes and samples are.
    """
    count = int(offsets[-1])
    numbers = (rows.labels, rows.crowd, rows.areas)
    lengths = {len(column) for column in (*numbers, rows.bboxes, rows.segmentations)}
    if lengths != {count} or len(rows.image_ids) != len(offsets) - 1:
        raise ValueError(f"columns of {sorted(lengths)} objects for {count} boxes")
    starts = pa.array(offsets)
    found = {
        name: pa.LargeListArray.from_arrays(starts, pa.array(np.asarray(values, _NUMBERS[name])))
        for name, values in zip(_NUMBERS, numbers, strict=True)
    }
    corners = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(rows.bboxes, np.float64).reshape(-1)), 4)
    found["instance_bbox"] = pa.LargeListArray.from_arrays(starts, corners)
    runs = pa.array(rows.segmentations, pa.large_binary())
    found["instance_segmentation"] = pa.LargeListArray.from_arrays(starts, runs)
    found["image_id"] = pa.array(np.asarray(rows.image_ids, np.int64))
    return found


def open_table(batch: pa.RecordBatch, offsets: np.ndarray | None, boxes: np.ndarray) -> InstanceTable | None:
    """The objects of a manifest, or None if it holds none."""
    if offsets is None or "instance_label" not in batch.schema.names:
        return None
    return InstanceTable(batch, offsets, boxes)
