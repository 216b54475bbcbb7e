"""How a class activation map becomes a box, and what the box is compared with: the papers' words, or published code."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from service.downstream import boxes, cam
from service.downstream.boxes import COMPONENTS, Component
from service.errors import ConfigError


@dataclass(frozen=True)
class Protocol:
    """All that a localization's numbers depend on, besides the model and the images.

    Attributes:
        name: "paper" or "official".
        component: which connected component is the largest; see `boxes`.
        smoothed: a 3 x 3 box filter goes over the map's cells first.
        enlargement: of the map to the size of the input.
        eight_bits: the map and the thresholds are rounded down to 8 bits, and a pixel has to exceed the threshold.
        clipped: true boxes are cut to what the network saw, and to whole pixels of it. Otherwise they count whole, in
            pixels of the source, even where the network could not see them.
    """

    name: str
    component: Component
    smoothed: bool
    enlargement: cam.Enlargement
    eight_bits: bool
    clipped: bool

    def cuts(self, thresholds: np.ndarray) -> np.ndarray:
        """Shares of the map's maximum (T,) as what a stretched map's pixel has to reach."""
        if not self.eight_bits:
            return np.asarray(thresholds, np.float64)
        return np.array([(int(threshold * 255) + 1) / 255 for threshold in thresholds])

    def maps(self, maps: Tensor) -> Tensor:
        """Class activation maps (N, h, w) as this protocol enlarges them, float32."""
        return cam.smoothed(maps.float()) if self.smoothed else maps.float()

    def heatmaps(self, maps: Tensor, size: int) -> Tensor:
        """Maps (N, h, w) of `maps` as (N, size, size) in 0 .. 1."""
        return cam.heatmaps(maps, size, self.enlargement)

    def boxes(self, maps: np.ndarray, size: int, thresholds: np.ndarray) -> np.ndarray:
        """(N, T, 4) int64 boxes of maps (N, h, w) of `maps`, in pixels of the input."""
        return boxes.cam_boxes(maps, size, self.cuts(thresholds), self.component, self.enlargement)

    def overlap(self, found: np.ndarray, truths: list[np.ndarray], windows: np.ndarray, size: int) -> np.ndarray:
        """(N, K) IoU of boxes (N, K, 4) in pixels of the input with the true ones (M_n, 4) in pixels of the source.

        Args:
            windows: (N, 4) (y, x, height, width) of the source that the input shows. size: side of the input, pixels.
        """
        if not self.clipped:
            return boxes.best_iou(boxes.to_source(found, windows, size), truths)
        return boxes.best_iou(found, _seen(truths, windows, size))

    def centre_overlap(
        self,
        shares: np.ndarray,
        heights: np.ndarray,
        widths: np.ndarray,
        truths: list[np.ndarray],
        windows: np.ndarray,
        size: int,
    ) -> np.ndarray:
        """(N, K) IoU of boxes in the middle, `shares` (K,) of both sides, with the true ones (M_n, 4) of the source.

        They are scored as found boxes are: in the middle of the source, or of what the network saw if true boxes are
        cut to that.

        Args:
            heights, widths: (N,) of the source. windows, size: as for `overlap`.
        """
        if not self.clipped:
            return boxes.best_iou(boxes.centre_boxes(heights, widths, shares), truths)
        sides = np.full(len(truths), size)
        return boxes.best_iou(boxes.centre_boxes(sides, sides, shares), _seen(truths, windows, size))


def _seen(truths: list[np.ndarray], windows: np.ndarray, size: int) -> list[np.ndarray]:
    """True boxes of the source cut to its window (N, 4), in whole pixels of an input of `size`."""
    counts = [len(truth) for truth in truths]
    # Of all images at once: one by one it would take longer than finding the boxes.
    whole = np.concatenate(truths).reshape(-1, 1, 4)
    inside = np.floor(np.clip(boxes.to_view(whole, np.repeat(windows, counts, axis=0), size)[:, 0], 0, size))
    return np.split(inside, np.cumsum(counts)[:-1])


PAPER = Protocol("paper", "pixels", smoothed=False, enlargement="bilinear", eight_bits=False, clipped=False)
# Co-mixup's localization code, which LoRot's table 9 follows; but its IoU, which is not clamped at 0, is ours.
OFFICIAL = Protocol("official", "contours", smoothed=True, enlargement="bicubic", eight_bits=True, clipped=True)
PROTOCOLS = {protocol.name: protocol for protocol in (PAPER, OFFICIAL)}


def choose(name: str = "paper", component: str | None = None) -> Protocol:
    """A protocol by its name, with its own or another kind of component; raises ConfigError that names what exists."""
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol {name!r} does not exist; there are {', '.join(PROTOCOLS)}")
    if component is None:
        return PROTOCOLS[name]
    for known in COMPONENTS:
        if component == known:
            return dataclasses.replace(PROTOCOLS[name], component=known)
    raise ConfigError(f"component {component!r} does not exist; there are {', '.join(COMPONENTS)}")
