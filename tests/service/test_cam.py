"""Class activation maps against hand-worked cases."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from service.downstream import boxes, cam


def test_the_mean_of_a_map_and_the_bias_make_the_logit() -> None:
    torch.manual_seed(0)
    features, fc = torch.randn(5, 8, 3, 4), nn.Linear(8, 6)
    classes = torch.tensor([0, 5, 2, 2, 3])
    maps = cam.class_activation_maps(features, fc.weight, classes)
    logits = fc(features.mean(dim=(2, 3)))
    torch.testing.assert_close(maps.mean(dim=(1, 2)) + fc.bias[classes], logits[torch.arange(5), classes])


def test_a_bright_square_gets_exactly_its_box() -> None:
    # The feature maps are the image's brightness and its negative; class 0 weighs the first, class 1 the second.
    image = torch.zeros(1, 1, 12, 12)
    image[..., 3:7, 5:10] = 1.0
    features = torch.cat([image, -image], dim=1)
    weight = torch.eye(2)
    for label, expected in ((0, [5, 3, 10, 7]), (1, [0, 0, 12, 12])):
        maps = cam.heatmaps(cam.class_activation_maps(features, weight, torch.tensor([label])), 12)
        found = boxes.largest_component_boxes(maps.numpy(), np.array([0.5]))
        assert found[0, 0].tolist() == expected


def test_an_enlarged_square_keeps_its_place() -> None:
    # 8 x 8 cells on an input of 32: cell rows 2-3, columns 4-6 are pixels 8-16, 16-28; at half the height an edge
    # that is interpolated linearly between two cell centres falls on the border of the cells.
    maps = torch.zeros(1, 8, 8)
    maps[:, 2:4, 4:7] = 3.0
    heat = cam.heatmaps(maps, 32)
    assert boxes.largest_component_boxes(heat.numpy(), np.array([0.5]))[0, 0].tolist() == [16, 8, 28, 16]


def test_heatmaps_span_0_to_1_whatever_the_maps_range() -> None:
    maps = torch.stack([torch.arange(16.0).view(4, 4) - 100, torch.arange(16.0).view(4, 4) * 1e-3])
    heat = cam.heatmaps(maps, 16)
    assert heat.shape == (2, 16, 16)
    assert heat.amin(dim=(1, 2)).tolist() == [0.0, 0.0]
    assert heat.amax(dim=(1, 2)).tolist() == [1.0, 1.0]


def test_a_map_without_contrast_covers_everything() -> None:
    heat = cam.heatmaps(torch.full((1, 2, 2), -7.0), 6)
    assert boxes.largest_component_boxes(heat.numpy(), np.array([0.95]))[0, 0].tolist() == [0, 0, 6, 6]


@pytest.mark.parametrize("enlargement", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("cells", "size"), [((7, 7), 224), ((4, 3), 10), ((8, 8), 8), ((12, 9), 6)])
def test_enlarged_maps_equal_torchs_interpolation(
    cells: tuple[int, int], size: int, enlargement: cam.Enlargement
) -> None:
    maps = torch.randn(3, *cells, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.interpolate(maps[:, None], size=(size, size), mode=enlargement)[:, 0]
    expected = expected - expected.amin(dim=(1, 2), keepdim=True)
    expected = expected / expected.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(cam.heatmaps(maps, size, enlargement), expected, atol=2e-6, rtol=0)


def test_smoothing_is_the_mean_of_nine_cells_with_zeros_around_the_map() -> None:
    maps = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))
    expected = np.stack([ndimage.uniform_filter(one, 3, mode="constant") for one in maps.numpy()])
    np.testing.assert_allclose(cam.smoothed(maps).numpy(), expected, atol=1e-6)
