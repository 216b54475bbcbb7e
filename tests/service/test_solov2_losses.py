"""Dice, focal loss and dynamic convolution against cases worked by hand and against torch's own operators."""

import math

import pytest
import torch
import torch.nn.functional as F

from service.models.solov2.assignment import Assignment
from service.models.solov2.branches import convolve_dynamically
from service.models.solov2.losses import class_loss, dice_loss, mask_loss


def test_dice_by_hand() -> None:
    probabilities = torch.tensor([[1, 0.5, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    targets = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.uint8)
    by_hand = [1 - 2 * 1.5 / (1.25 + 2 + 0.002), 1 - 4 / 4.002, 1]
    assert dice_loss(probabilities, targets).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_dice_counts_more_pixels_than_a_byte_holds() -> None:
    ones = torch.ones(1, 1000)
    assert dice_loss(ones, ones.to(torch.uint8)).item() == pytest.approx(1 - 2000 / 2000.002, abs=1e-6)


def test_class_loss_by_hand() -> None:
    # Two cells, two classes, all probabilities 1/2: the positive weighs 1/4, three negatives 3/4; (1 - p)^2 is 1/4.
    labels = torch.tensor([[1, -1]])
    by_hand = math.log(2) / 4 * (0.25 + 3 * 0.75) / (1 + 1)
    assert class_loss(torch.zeros(1, 2, 2), labels, 0.25, 2.0).item() == pytest.approx(by_hand)
    # The right class is the one whose logit lowers it.
    right = torch.tensor([[[0.0, 5], [0, 0]]])
    wrong = torch.tensor([[[5.0, 0], [0, 0]]])
    assert class_loss(right, labels, 0.25, 2.0) < by_hand < class_loss(wrong, labels, 0.25, 2.0)


def test_dynamic_convolution_is_conv2d_with_each_objects_own_kernel() -> None:
    draw = torch.Generator().manual_seed(0)
    kernels, features = torch.randn(7, 16, generator=draw), torch.randn(16, 9, 11, generator=draw)
    expected = torch.stack([F.conv2d(features[None], kernel.view(1, 16, 1, 1))[0, 0] for kernel in kernels])
    torch.testing.assert_close(convolve_dynamically(kernels, features), expected)
    assert convolve_dynamically(kernels[:0], features).shape == (0, 9, 11)


def test_mask_loss_is_the_mean_over_all_pairs_of_cell_and_object() -> None:
    draw = torch.Generator().manual_seed(0)
    kernels, features = torch.randn(2, 6, 4, generator=draw), torch.randn(2, 4, 5, 5, generator=draw)
    masks = [(torch.rand(2, 5, 5, generator=draw) < 0.5).to(torch.uint8), torch.ones(1, 5, 5, dtype=torch.uint8)]
    labels = torch.zeros(6, dtype=torch.int64)
    pairs = [(0, 3, 1), (0, 3, 0), (0, 5, 1), (1, 0, 0)]
    assignments = [
        Assignment(labels, *(torch.tensor([pair[at] for pair in pairs if pair[0] == image]) for at in (1, 2)))
        for image in (0, 1)
    ]
    each = []
    for image, cell, instance in pairs:
        logits = F.conv2d(features[image, None], kernels[image, cell].view(1, 4, 1, 1))
        each.append(dice_loss(logits.sigmoid().view(1, -1), masks[image][instance].view(1, -1)))
    torch.testing.assert_close(mask_loss(kernels, features, assignments, masks), torch.cat(each).mean())


def test_without_objects_the_mask_loss_is_0_and_its_gradient_is_there() -> None:
    kernels, features = torch.randn(1, 6, 4, requires_grad=True), torch.randn(1, 4, 5, 5, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    assigned = Assignment(torch.full((6,), -1), none, none)
    loss = mask_loss(kernels, features, [assigned], [torch.zeros(0, 5, 5, dtype=torch.uint8)])
    loss.backward()
    assert loss == 0
    assert kernels.grad is not None
    assert features.grad is not None
    assert not kernels.grad.any()
    assert not features.grad.any()
