"""Points NMS, matrix NMS and decoding against cases worked by hand and against plain loops."""

import math
from dataclasses import replace

import pytest
import torch

from service.models.solov2.decoding import boxes_around, decode
from service.models.solov2.options import Options
from service.models.solov2.suppression import matrix_nms, points_nms

# Logits of +-10: what the sigmoid makes of them.
SURE = 1 / (1 + math.exp(-10))


def test_points_nms_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3], [0.2, 0.8, 0.9], [0.5, 0.4, 0.95]])
    # Each stays if none above, to the left or between is higher; equal ones stay both.
    expected = torch.tensor([[0.1, 0.9, 0], [0.2, 0, 0.9], [0.5, 0, 0.95]])
    assert torch.equal(points_nms(scores[None, None])[0, 0], expected)


def test_points_nms_treats_classes_apart() -> None:
    scores = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    apart = torch.stack([points_nms(scores[:, [label]])[:, 0] for label in range(3)], dim=1)
    assert torch.equal(points_nms(scores), apart)


def _matrix_nms_by_loops(masks: torch.Tensor, labels: list[int], scores: list[float], sigma: float) -> list[float]:
    def iou(i: int, j: int) -> float:
        union = (masks[i] | masks[j]).sum().item()
        return (masks[i] & masks[j]).sum().item() / union if union else 0.0

    def rivals(j: int) -> list[int]:
        return [i for i in range(j) if labels[i] == labels[j]]

    lowered = []
    for j, score in enumerate(scores):
        decay = 1.0
        for i in rivals(j):
            own = max((iou(k, i) for k in rivals(i)), default=0.0)
            decay = min(decay, math.exp(-sigma * iou(i, j) ** 2) / math.exp(-sigma * own**2))
        lowered.append(score * decay)
    return lowered


@pytest.mark.parametrize("seed", range(3))
def test_matrix_nms_is_its_definition_in_loops(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 8, (20, 2), generator=draw)
    masks = torch.zeros(20, 16, 16, dtype=torch.bool)
    for mask, (y, x) in zip(masks, corners.tolist(), strict=True):
        mask[y : y + 7, x : x + 8] = True
    labels = torch.randint(0, 3, (20,), generator=draw)
    scores = torch.rand(20, generator=draw).sort(descending=True).values
    expected = _matrix_nms_by_loops(masks, labels.tolist(), scores.tolist(), 2.0)
    lowered = matrix_nms(masks, labels, scores, sigma=2.0)
    assert lowered.tolist() == pytest.approx(expected, rel=1e-5)
    assert (lowered < scores).any()


def test_matrix_nms_by_hand() -> None:
    masks = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)[:, None]
    lowered = matrix_nms(masks, torch.tensor([0, 0, 0, 1]), torch.tensor([0.9, 0.8, 0.7, 0.6]), sigma=2.0)
    # 0 and 1 are one object. 2 overlaps with both by half; that of 1 counts little, as 1 itself goes.
    by_hand = [0.9, 0.8 * math.exp(-2), 0.7 * math.exp(-2 * 0.25), 0.6]
    assert lowered.tolist() == pytest.approx(by_hand)
    assert len(matrix_nms(masks[:0], torch.zeros(0), torch.zeros(0), sigma=2.0)) == 0


def test_boxes_are_tight_and_half_open() -> None:
    masks = torch.zeros(2, 6, 9, dtype=torch.bool)
    masks[0, 5, 8] = True
    masks[1, 1, 2] = masks[1, 3, 0] = True
    assert boxes_around(masks).tolist() == [[8, 5, 9, 6], [0, 1, 3, 4]]


def _quadrants() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four cells of one level: two see the top left of 32 x 32 px, one the bottom right, one hardly anything."""
    features = torch.full((2, 8, 8), -10.0)
    features[0, :4, :4] = features[1, 4:, 4:] = 10
    kernels = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    scores = torch.tensor([[0.9, 0], [0.8, 0], [0, 0.7], [0, 0.05]])
    return scores, kernels, features


def test_decoding_by_hand() -> None:
    found = decode(*_quadrants(), torch.full((4,), 8), (32, 32), Options())
    assert found.masks is not None
    assert found.scores.tolist() == pytest.approx([0.9 * SURE, 0.7 * SURE, 0.8 * SURE * math.exp(-2)], rel=1e-5)
    assert found.labels.tolist() == [0, 1, 0]
    assert found.boxes.tolist() == [[0, 0, 16, 16], [16, 16, 32, 32], [0, 0, 16, 16]]
    # 16 x 16 without the pixel in the corner: interpolated along both axes it has 5/8 of 5/8, less than a half.
    assert found.masks.sum(dim=(1, 2)).tolist() == [255] * 3


def test_masks_end_with_the_content_and_what_lies_in_the_padding_is_no_detection() -> None:
    found = decode(*_quadrants(), torch.full((4,), 8), (32, 20), Options())
    assert found.boxes.tolist() == [[0, 0, 16, 16], [16, 16, 20, 32], [0, 0, 16, 16]]
    found = decode(*_quadrants(), torch.full((4,), 8), (14, 16), Options())
    assert found.labels.tolist() == [0, 0]
    assert found.boxes.tolist() == [[0, 0, 16, 14]] * 2
    assert found.masks is not None
    assert found.masks.shape == (2, 14, 16)
    # What goes on to another size is of the same detections.
    assert found.soft is not None
    assert torch.equal(found.soft.all_drawn((14, 16)), found.masks)


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"score_thresh": 0.04}, 4),
        ({"score_thresh": 0.75}, 2),
        ({"update_thresh": 0.2}, 2),
        ({"nms_sigma": 0.1, "update_thresh": 0.7}, 2),
        ({"max_per_image": 1}, 1),
        ({"nms_pre": 2}, 2),
        ({"max_candidates": 2}, 2),
        ({"mask_thresh": 0.99999}, 0),
        ({"score_thresh": 0.95}, 0),
    ],
)
def test_every_threshold_is_an_option(changed: dict[str, float], kept: int) -> None:
    options = replace(Options(update_thresh=0.0), **changed)
    found = decode(*_quadrants(), torch.full((4,), 8), (32, 32), options)
    assert found.masks is not None
    assert len(found.boxes) == len(found.scores) == len(found.labels) == len(found.masks) == kept
    assert found.boxes.shape[1:] == (4,)
    assert found.masks.shape[1:] == (32, 32)


def test_a_mask_of_fewer_pixels_than_its_levels_stride_is_no_detection() -> None:
    # Each has 16 pixels at a quarter of the size.
    strides = torch.tensor([15, 16, 15, 15])
    assert decode(*_quadrants(), strides, (32, 32), Options()).scores.tolist() == pytest.approx(
        [0.9 * SURE, 0.7 * SURE]
    )
