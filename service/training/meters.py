"""Sums behind the metrics of a window of steps, kept in one flat tensor so that one all_reduce serves all of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.training.objectives import Losses

# Above this many classes the confusion matrix is too large to read, and to send.
MAX_CONFUSION_CLASSES = 200

# Step times fall into bins 1 % wide, because bins add up over ranks and percentiles do not.
_SHORTEST_S, _LONGEST_S = 1e-5, 1e5
_BIN = math.log(1.01)
_NUM_BINS = math.ceil(math.log(_LONGEST_S / _SHORTEST_S) / _BIN)


@dataclass(frozen=True)
class Summary:
    """A window's results over all ranks.

    Attributes:
        metrics: by name, without a `train/` or `val/` before it: each loss, top1, top5, pretext_accuracy (fractions 0
            to 1), images_per_s, data_wait_share, step_time_p50_s, step_time_p95_s (within 0.5 %), memory_bytes
            (the largest of any rank). What was not measured is left out.
        confusion: (num_classes, num_classes) int64 counts, rows true and columns predicted, or None.
    """

    metrics: dict[str, float]
    confusion: np.ndarray | None


class Meters:
    """Adds up samples and steps until `collect`. Updating starts no transfer from the device and waits for nothing.

    A sample with `valid` False counts nowhere. With fewer than five classes, top-5 is top-`num_classes`.

    Args:
        num_classes: outputs of the class head; 0 where there are no logits: then only `add` may be called.
        losses: names of the losses to average over samples; pretext accuracy comes with "pretext_loss".
        device: where logits are.
        rank, world_size: this process among those that reduce together.
        confusion: count (true, predicted) pairs too, if there are at most 200 classes.
    """

    def __init__(
        self,
        num_classes: int,
        losses: tuple[str, ...],
        *,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        confusion: bool = False,
    ) -> None:
        self._num_classes, self._losses = num_classes, losses
        self._rank, self._world_size = rank, world_size
        num_pairs = num_classes**2 if confusion and num_classes <= MAX_CONFUSION_CLASSES else 0
        # Samples: count, top-1, top-5, pretext count and hits. Steps: seconds, and those spent waiting for data.
        sizes = {"samples": 5, "losses": len(losses), "pairs": num_pairs}
        sizes |= {"steps": 2, "histogram": _NUM_BINS, "memory": world_size}
        self._flat = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=device)
        self._part = dict(zip(sizes, self._flat.split(list(sizes.values())), strict=True))
        self._times_s: list[float] = []
        self._waits_s: list[float] = []
        self._kept = self._flat

    @torch.no_grad()
    def update(self, result: Losses, labels: Tensor, valid: Tensor) -> None:
        """Add one micro-batch: an objective's result, the (N,) int64 labels and the (N,) bool mask of real samples."""
        top = result.logits.topk(min(5, self._num_classes)).indices
        hits = (top == labels[:, None]) & valid[:, None]
        count = valid.sum()
        counts = [count, hits[:, 0].sum(), hits.sum()]
        if "pretext_loss" in self._losses:
            pretext_logits, pretext_labels, pretext_valid = result[2:]
            assert pretext_logits is not None
            assert pretext_valid is not None
            counts += [pretext_valid.sum(), ((pretext_logits.argmax(1) == pretext_labels) & pretext_valid).sum()]
        self._part["samples"][: len(counts)] += torch.stack(counts)
        self._add_losses(result.losses, count)
        if len(self._part["pairs"]):
            self._part["pairs"].index_add_(0, labels * self._num_classes + top[:, 0], valid.double())

    @torch.no_grad()
    def add(self, losses: Mapping[str, Tensor], count: Tensor) -> None:
        """Add one micro-batch that has losses only: their means over its `count` real samples, a 0-d integer."""
        self._part["samples"][0] += count
        self._add_losses(losses, count)

    def keep(self) -> None:
        """Remember the sums as they are, for a step whose update may be left out."""
        self._kept = self._flat.clone()

    def put_back(self) -> None:
        """Forget what was added since `keep`."""
        self._flat.copy_(self._kept)

    def state(self) -> dict[str, Any]:
        """The window so far, of this rank, as JSON values; floats keep every bit."""
        self._add_steps()
        part = {name: self._part[name].tolist() for name in ("samples", "losses", "steps")}
        # Of some two thousand bins a window fills a few.
        bins = self._part["histogram"].nonzero().flatten()
        return part | {"histogram": [bins.tolist(), self._part["histogram"][bins].tolist()]}

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Go on with a window that `state` describes, of this rank or another; several may be added."""
        for name in ("samples", "losses", "steps"):
            self._part[name] += torch.tensor(state[name], dtype=torch.float64, device=self._flat.device)
        bins, counts = state["histogram"]
        self._part["histogram"][torch.tensor(bins, dtype=torch.int64, device=self._flat.device)] += torch.tensor(
            counts, dtype=torch.float64, device=self._flat.device
        )

    def clear(self) -> None:
        """Begin a fresh window."""
        self._flat.zero_()
        self._times_s, self._waits_s = [], []

    def record_step(self, seconds: float, waited_s: float) -> None:
        """Add one step's wall time and the part of it that was spent waiting for data."""
        self._times_s.append(seconds)
        self._waits_s.append(waited_s)

    def collect(
        self, all_reduce: Callable[[Tensor], object] | None = None, memory_bytes: float | None = None
    ) -> Summary:
        """The window's results, and a fresh window. Every rank must call it, and every rank gets the same.

        Args:
            all_reduce: sums a tensor over all ranks in place; None for a single process.
            memory_bytes: this rank's memory, if it is to be reported.
        """
        self._add_steps()
        if memory_bytes is not None:
            # One slot a rank: a sum over ranks then holds every rank's own number, and the largest can be told.
            self._part["memory"][self._rank] = memory_bytes
        if all_reduce is not None:
            all_reduce(self._flat)
        values = self._flat.cpu().numpy()
        lengths = [len(part) for part in self._part.values()]
        part = dict(zip(self._part, np.split(values, np.cumsum(lengths)[:-1]), strict=True))
        side = self._num_classes
        confusion = part["pairs"].astype(np.int64).reshape(side, side) if len(part["pairs"]) else None
        summary = Summary(self._metrics(part), confusion)
        self._flat.zero_()
        return summary

    def _add_losses(self, losses: Mapping[str, Tensor], count: Tensor) -> None:
        if self._losses:
            # Means become sums again. An empty micro-batch adds nothing, whatever its loss says.
            means = torch.stack([losses[name].detach() for name in self._losses]).double()
            self._part["losses"] += torch.where(count > 0, means * count, 0.0)

    def _add_steps(self) -> None:
        if not self._times_s:
            return
        times = np.asarray(self._times_s)
        bins = np.floor(np.log(np.maximum(times, _SHORTEST_S) / _SHORTEST_S) / _BIN).astype(np.int64)
        counts = np.bincount(np.minimum(bins, _NUM_BINS - 1), minlength=_NUM_BINS)
        self._part["histogram"] += torch.as_tensor(counts, device=self._flat.device)
        self._part["steps"] += torch.tensor([times.sum(), sum(self._waits_s)], device=self._flat.device)
        self._times_s, self._waits_s = [], []

    def _metrics(self, part: dict[str, np.ndarray]) -> dict[str, float]:
        count, top1, top5, pretext_count, pretext_hits = part["samples"].tolist()
        time_s, waited_s = part["steps"].tolist()
        metrics: dict[str, float] = {}
        if count:
            metrics |= dict(zip(self._losses, (part["losses"] / count).tolist(), strict=True))
        if count and self._num_classes:
            metrics |= {"top1": top1 / count, "top5": top5 / count}
        if pretext_count:
            metrics["pretext_accuracy"] = pretext_hits / pretext_count
        if time_s:
            metrics["images_per_s"] = count * self._world_size / time_s
            metrics["data_wait_share"] = waited_s / time_s
            metrics["step_time_p50_s"] = _percentile(part["histogram"], 0.50)
            metrics["step_time_p95_s"] = _percentile(part["histogram"], 0.95)
        if part["memory"].any():
            metrics["memory_bytes"] = float(part["memory"].max())
        return metrics


def _percentile(histogram: np.ndarray, share: float) -> float:
    """The middle of the bin in which the smallest time lies that at least `share` of all times do not exceed."""
    below = np.cumsum(histogram)
    index = int(np.searchsorted(below, share * below[-1] - 1e-9))
    return _SHORTEST_S * math.exp((index + 0.5) * _BIN)
