"""COCO's average precision of boxes or masks, collected image by image and over any number of workers.

Computed by faster-coco-eval, whose numbers are pycocotools' own (Lin et al., "Microsoft COCO", ECCV 2014;
cocodataset.org, "Detection Evaluation"). What is kept of an image is a few numbers and, for masks, run lengths.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from pipelines import run_lengths
from pipelines.instance_columns import Objects
from pipelines.manifest import Manifest
from service.errors import DataError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
KINDS = ("bbox", "segm")


class Scorer:
    """Detections of the images seen so far, and what they are worth.

    Images that were never given count nowhere, neither their objects; so a pass over a part of the data is scored on
    that part. An image without detections must be given too, with empty arrays.
    """

    def __init__(self, manifest: Manifest, kind: str = "bbox") -> None:
        """A scorer of "bbox" or "segm".

        Raises:
            DataError: the data set does not say what is in which box, or has no segmentations to compare masks with.
            ValueError: another kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} does not exist; there are {', '.join(KINDS)}")
        if manifest.instances is None:
            raise DataError(
                f"{manifest.name} {manifest.split}: has no objects to compare with; use one of COCO's format"
            )
        if kind == "segm" and not manifest.instances.has_segmentations:
            raise DataError(f"{manifest.name} {manifest.split}: has no segmentations to compare masks with")
        self._manifest, self._table, self._kind = manifest, manifest.instances, kind
        # By row of the manifest: scores, labels, boxes (x_min, y_min, x_max, y_max), run lengths.
        self._found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, list[bytes]]] = {}

    def __len__(self) -> int:
        """Images given so far."""
        return len(self._found)

    def update(
        self,
        sample: int,
        boxes: Tensor | np.ndarray,
        scores: Tensor | np.ndarray,
        labels: Tensor | np.ndarray,
        masks: Tensor | np.ndarray | Sequence[bytes] | None = None,
    ) -> None:
        """Take note of what was found in one image.

        Args:
            sample: its row of the manifest.
            boxes: (K, 4) (x_min, y_min, x_max, y_max), half-open, source pixels.
            scores: (K,). labels: (K,) classes from 0 on.
            masks: of "segm": (K, H, W) over the source image, true or not 0 on the object; or K run lengths.

        Raises:
            ValueError: lengths or sizes do not fit, a number is not finite, a class does not exist, or the image was
                given before.
        """
        sample = int(sample)
        self._check_place(sample)
        corners = _array(boxes, np.float64).reshape(-1, 4)
        worth, classes = _array(scores, np.float64).reshape(-1), _array(labels, np.int64).reshape(-1)
        size = int(self._manifest.heights[sample]), int(self._manifest.widths[sample])
        runs: list[bytes] = []
        if self._kind == "segm":
            if masks is None:
                raise ValueError(f"image {sample}: no masks, though masks are scored")
            runs = _runs(masks, size)
        self._add(sample, worth, classes, corners, runs)

    def state(self) -> Tensor:
        """(B,) uint8: all that was given so far, for `merge` in another process."""
        ids = sorted(self._found)
        kept = [self._found[sample] for sample in ids]
        runs = [own for found in kept for own in found[3]]
        columns = {
            "ids": np.array(ids, np.int64),
            "counts": np.array([len(found[0]) for found in kept], np.int64),
            "scores": _joined([found[0] for found in kept], (0,)),
            "labels": _joined([found[1] for found in kept], (0,)).astype(np.int64),
            "boxes": _joined([found[2] for found in kept], (0, 4)),
            "run_sizes": np.array([len(own) for own in runs], np.int64),
            "runs": np.frombuffer(b"".join(runs), np.uint8) if runs else np.zeros(0, np.uint8),
        }
        return torch.frombuffer(bytearray(save(columns)), dtype=torch.uint8)

    def merge(self, state: Tensor) -> None:
        """Add what another process was given; raises ValueError if that is no state, or an image is in both."""
        try:
            columns = load(state.detach().cpu().contiguous().numpy().tobytes())
            ids, counts = columns["ids"], columns["counts"]
            ends, run_ends = np.cumsum(counts), np.cumsum(columns["run_sizes"])
            scores, labels, boxes = columns["scores"], columns["labels"], columns["boxes"]
            content = columns["runs"].tobytes()
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"no state of a scorer: {error}") from None
        for sample, start, end in zip(ids.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True):
            runs: list[bytes] = []
            if self._kind == "segm":
                places = zip(
                    (run_ends - columns["run_sizes"])[start:end].tolist(), run_ends[start:end].tolist(), strict=True
                )
                runs = [content[begin:stop] for begin, stop in places]
            self._add(sample, scores[start:end], labels[start:end], boxes[start:end], runs)

    def compute(self) -> dict[str, float]:
        """METRICS over the images given, 0 to 1; NaN where no object of that size is there to be found.

        Raises:
            ValueError: no image was given.
        """
        if not self._found:
            raise ValueError("no image was given, so there is nothing to score")
        truth = COCO(self._truth())
        found = truth.loadRes(self._results())
        evaluator = COCOeval_faster(truth, found, self._kind, extra_calc=False)
        evaluator.run()
        stats = [float(value) for value in evaluator.stats[: len(METRICS)]]
        # COCO writes -1 for what cannot be said.
        return {name: value if value >= 0 else float("nan") for name, value in zip(METRICS, stats, strict=True)}

    def _add(self, sample: int, scores: np.ndarray, labels: np.ndarray, boxes: np.ndarray, runs: list[bytes]) -> None:
        self._check_place(sample)
        if not len(scores) == len(labels) == len(boxes) or (self._kind == "segm" and len(runs) != len(scores)):
            raise ValueError(
                f"image {sample}: {len(boxes)} boxes, {len(scores)} scores, {len(labels)} labels, {len(runs)} masks"
            )
        if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
            raise ValueError(f"image {sample}: a score or a box is not finite")
        classes = len(self._manifest.classes)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"image {sample}: labels {labels.min()} to {labels.max()} of {classes} classes")
        self._found[sample] = scores, labels, boxes, runs

    def _check_place(self, sample: int) -> None:
        if not 0 <= sample < len(self._manifest):
            raise ValueError(f"image {sample} is none of the {len(self._manifest)} of {self._manifest.name}")
        if sample in self._found:
            raise ValueError(f"image {sample} was given twice; each counts once")

    def _truth(self) -> dict[str, Any]:
        """The objects of the images given, as the evaluator wants them; image ids count from 1."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for sample in sorted(self._found):
            height, width = int(self._manifest.heights[sample]), int(self._manifest.widths[sample])
            images.append({"id": sample + 1, "height": height, "width": width})
            annotations += self._annotations(sample, self._table.of(sample), [height, width], len(annotations) + 1)
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(self._manifest.classes)]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def _annotations(self, sample: int, known: Objects, size: list[int], first: int) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = []
        for number, label in enumerate(known.labels.tolist()):
            about: dict[str, Any] = {
                "id": first + len(listed),
                "image_id": sample + 1,
                "category_id": label + 1,
                "bbox": known.bboxes[number].tolist(),
                "area": float(known.areas[number]),
                "iscrowd": int(known.crowd[number]),
            }
            if self._kind == "segm":
                if not known.segmentations[number]:
                    continue
                about["segmentation"] = {"size": size, "counts": known.segmentations[number].decode()}
            listed.append(about)
        return listed

    def _results(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = []
        for sample in sorted(self._found):
            scores, labels, boxes, runs = self._found[sample]
            size = [int(self._manifest.heights[sample]), int(self._manifest.widths[sample])]
            for number in range(len(scores)):
                about: dict[str, Any] = {
                    "image_id": sample + 1,
                    "category_id": int(labels[number]) + 1,
                    "score": float(scores[number]),
                }
                if self._kind == "segm":
                    about["segmentation"] = {"size": size, "counts": runs[number].decode()}
                else:
                    left, top, right, bottom = boxes[number].tolist()
                    about["bbox"] = [left, top, right - left, bottom - top]
                listed.append(about)
        return listed


def _runs(masks: Tensor | np.ndarray | Sequence[bytes], size: tuple[int, int]) -> list[bytes]:
    """Run lengths of masks over an image of (height, width) `size`."""
    if not isinstance(masks, Tensor | np.ndarray):
        return [run_lengths.checked(own, *size) for own in masks]
    planes = masks.detach().cpu().numpy() if isinstance(masks, Tensor) else masks
    if planes.ndim != 3 or (len(planes) and planes.shape[1:] != size):
        raise ValueError(f"masks {planes.shape} for an image of {size[0]} x {size[1]} (height x width) pixels")
    return run_lengths.encode(planes)


def _array(values: Tensor | np.ndarray, kind: type) -> np.ndarray:
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.array(found, kind)


def _joined(parts: list[np.ndarray], empty: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(empty, np.float64)
