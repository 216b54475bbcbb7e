import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines import dali, torch_reference
from pipelines.plan import Plan, View
from pipelines.torch_reference import rotate_patch
from tests.pipelines.conftest import draw, write_pixels

UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}


def rotated(images, boxes, turns):
    """The same with numpy: images (N, C, H, W)."""
    result = images.copy()
    for image, (y, x, side), turn in zip(result, boxes, turns, strict=True):
        image[:, y : y + side, x : x + side] = np.rot90(image[:, y : y + side, x : x + side], turn, axes=(1, 2))
    return result


def all_cases(size):
    """Boxes in every corner, in the middle, of one pixel and of the whole image, each with every turn."""
    boxes = [(0, 0, size)]
    for side in (1, 2, 3, size // 2, size - 1):
        last = size - side
        boxes += [(0, 0, side), (0, last, side), (last, 0, side), (last, last, side), (last // 2, last // 3, side)]
    return np.repeat(np.array(boxes), 4, axis=0), np.tile(np.arange(4), len(boxes))


def plan_for(boxes, turns, size):
    count = len(boxes)
    zeros = np.zeros(count, np.int64)
    windows = np.tile(np.array([0, 0, size, size]), (count, 1))
    rows = (np.arange(count), zeros, windows, zeros.astype(bool), boxes, turns, turns, np.ones(count, bool))
    return Plan(*rows, size, np.zeros((count, 0), np.int64), np.zeros((count, 0, 4), np.float32))


def render_with_dali(view, samples, plan, *, resizes):
    graph = dali.Graph(view, encoded=False, window="inside", resizes=resizes, flips=False, rotates=True)
    renderer = dali.Renderer(graph, device="cpu", batch_size=len(samples), num_threads=1, depth=1)
    renderer.submit(renderer.prepare(samples, plan))
    images = renderer.collect()
    renderer.close()
    return images


@given(st.data())
def test_a_turned_box_equals_numpys_rot90(data):
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    count, channels = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    boxes = []
    for _ in range(count):
        side = data.draw(st.integers(1, min(height, width)))
        boxes.append((data.draw(st.integers(0, height - side)), data.draw(st.integers(0, width - side)), side))
    turns = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    images = np.arange(count * channels * height * width).reshape(count, channels, height, width)
    result = rotate_patch(torch.from_numpy(images), torch.tensor(boxes), torch.tensor(turns))
    np.testing.assert_array_equal(result.numpy(), rotated(images, boxes, turns))


def test_one_quarter_turn_is_counter_clockwise():
    image = torch.tensor([[[[1, 2], [3, 4]]]])
    assert rotate_patch(image, torch.tensor([[0, 0, 2]]), torch.tensor([1])).tolist() == [[[[2, 4], [1, 3]]]]


@pytest.mark.parametrize("size", [4, 7, 32])
def test_corners_and_single_pixels_turn_exactly_in_both_renderings(size):
    boxes, turns = all_cases(size)
    samples = [np.random.default_rng(n).integers(0, 256, (size, size, 3), dtype=np.uint8) for n in range(len(boxes))]
    expected = rotated(np.stack(samples).transpose(0, 3, 1, 2), boxes, turns)
    view, plan = View(size=size, **UNIT), plan_for(boxes, turns, size)
    np.testing.assert_array_equal(render_with_dali(view, samples, plan, resizes=False).numpy().round(3), expected)
    np.testing.assert_array_equal(torch_reference.render_batch(samples, view, plan).numpy().round(3), expected)


@pytest.mark.parametrize("value", [(0, 0, 0), (255, 255, 255), (37, 201, 99)])
def test_no_box_and_no_turn_leaves_a_trace_on_a_blank_image(value):
    size = 32
    boxes, turns = all_cases(size)
    # Every sample is enlarged or shrunk by its own odd factor first.
    shapes = [(20 + 3 * n % 90, 25 + 7 * n % 90) for n in range(len(boxes))]
    samples = [np.full((*shape, 3), value, np.uint8) for shape in shapes]
    view = View(size=size)
    plan = plan_for(boxes, turns, size)
    plan.windows[:, 2:] = shapes
    mean, std = (torch.tensor(part)[:, None, None] * 255 for part in (view.mean, view.std))
    blank = (torch.tensor(value)[:, None, None] - mean) / std
    for images in (
        render_with_dali(view, samples, plan, resizes=True),
        torch_reference.render_batch(samples, view, plan),
    ):
        # Not only near the right colour: the same number in every pixel of every image.
        assert (images == images[:1, :, :1, :1]).all()
        torch.testing.assert_close(images[:1, :, :1, :1], blank[None], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_type_and_memory_format_are_kept_and_the_input_is_not_touched(layout, dtype):
    images = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).to(dtype).contiguous(memory_format=layout)
    before = images.clone()
    turned = rotate_patch(images, torch.tensor([[1, 2, 4], [0, 0, 8]]), torch.tensor([1, 0]))
    assert turned.dtype == dtype
    assert turned.stride() == images.stride()
    assert torch.equal(images, before)
    assert torch.equal(turned[1], images[1])
    assert turned.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("box", [(0, 1, 8), (-1, 0, 2), (6, 6, 3), (0, 0, 0)])
def test_a_box_outside_the_image_is_an_error(box):
    with pytest.raises(ValueError, match="does not fit 8 x 8"):
        rotate_patch(torch.zeros(1, 1, 8, 8), torch.tensor([box]), torch.tensor([1]))


def test_drawn_pictures_turn_alike_in_both_renderings(tmp_path):
    manifest = write_pixels(tmp_path, np.stack([np.asarray(draw(n, 32, 32)) for n in range(8)]))
    boxes, turns = all_cases(32)
    boxes, turns = boxes[4:12], turns[4:12]
    samples = [manifest.read(n) for n in range(8)]
    view, plan = View(size=32, **UNIT), plan_for(boxes, turns, 32)
    ours = render_with_dali(view, samples, plan, resizes=False)
    np.testing.assert_allclose(ours, torch_reference.render_batch(samples, view, plan), atol=1e-3)
