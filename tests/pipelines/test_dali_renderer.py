"""The host's graph and the device's, from one plan: types of output, odd requests, and the order of things."""

import numpy as np
import pytest
import torch

from pipelines import dali, pretext, torch_reference
from pipelines.plan import View, train_plan

VIEW = View(size=48)
COUNT = 12
DTYPES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "uint8": 0.0}


def plan_of(manifest, view=VIEW, task="lorot_e", count=COUNT):
    ids = np.arange(count)
    sizes = manifest.heights[ids], manifest.widths[ids]
    return train_plan(view, pretext.load(task), 0, np.zeros(count, np.int64), ids, *sizes)


def render(manifest, plan, *, stock=False, dtype="float32", view=VIEW, num_threads=1):
    graph = dali.Graph(
        view=view, encoded=manifest.encoded, window="inside", resizes=True, flips=True, rotates=True, dtype=dtype
    )
    count = len(plan.ids)
    renderer = dali.Renderer(graph, device="cpu", batch_size=count, num_threads=num_threads, depth=1, stock=stock)
    renderer.submit(renderer.prepare([manifest.read(sample) for sample in plan.ids], plan))
    images = renderer.collect().clone(memory_format=torch.preserve_format)
    renderer.close()
    return images


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("dtype", dali.DTYPES)
def test_every_type_of_output_holds_the_same_pixels(files, dtype, stock):
    plan = plan_of(files)
    images, floats = render(files, plan, stock=stock, dtype=dtype), render(files, plan, stock=stock)
    assert images.dtype == getattr(torch, dtype)
    assert images.is_contiguous(memory_format=torch.channels_last)
    if dtype == "uint8":
        mean, std = (torch.tensor(part)[None, :, None, None] * 255 for part in (VIEW.mean, VIEW.std))
        assert torch.equal(images, (floats * std + mean).round().to(torch.uint8))
    else:
        relative = (images.float() - floats).abs() / floats.abs().clamp(min=0.05)
        assert relative.max() <= DTYPES[dtype]


def test_halves_are_the_floats_rounded_to_the_nearest(files):
    plan = plan_of(files)
    exact = (render(files, plan, dtype="uint8").float() / 255 - torch.tensor(VIEW.mean)[None, :, None, None]).double()
    exact /= torch.tensor(VIEW.std)[None, :, None, None].double()
    for dtype in (torch.float16, torch.bfloat16):
        images = render(files, plan, dtype=str(dtype).removeprefix("torch."))
        # Of the two neighbours in that type none is nearer, but for what the floats' own rounding leaves open.
        error = (images.double() - exact).abs()
        spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-3)
        assert (error <= 0.5 * spacing + 1e-6).all()


def test_the_host_comes_closer_to_the_reference_than_a_fiftieth_of_a_grey_level(files):
    plan = plan_of(files)
    expected = torch_reference.render_batch([files.read(sample) for sample in plan.ids], VIEW, plan)
    difference = (render(files, plan) - expected) * torch.tensor(VIEW.std)[None, :, None, None] * 255
    assert difference.abs().max() < 2.01
    assert difference.abs().mean() < 0.02


def test_one_thread_or_three_give_the_same_bits(files):
    plan = plan_of(files)
    assert torch.equal(render(files, plan), render(files, plan, num_threads=3))


@pytest.mark.parametrize("stock", [False, True])
def test_the_size_may_change_from_batch_to_batch(files, stock):
    graph = dali.Graph(view=VIEW, encoded=True, window="inside", resizes=True, flips=True, rotates=True)
    renderer = dali.Renderer(graph, device="cpu", batch_size=COUNT, num_threads=1, depth=2, stock=stock)
    samples = [files.read(sample) for sample in range(COUNT)]
    sizes = (32, 48, 64, 16)
    shapes = []
    for number, size in enumerate(sizes):
        renderer.submit(renderer.prepare(samples, plan_of(files, View(size=size))))
        if number:
            shapes.append(renderer.collect().shape)
    shapes.append(renderer.collect().shape)
    assert [tuple(shape) for shape in shapes] == [(COUNT, 3, size, size) for size in sizes]


def test_pixels_and_their_lossless_file_are_rendered_alike(pixels, tmp_path):
    import io

    from PIL import Image

    plan = plan_of(pixels, task="rotation")
    direct = render(pixels, plan)
    encoded = []
    for sample in plan.ids:
        buffer = io.BytesIO()
        Image.fromarray(pixels.read(sample)).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    graph = dali.Graph(view=VIEW, encoded=True, window="inside", resizes=True, flips=True, rotates=True)
    renderer = dali.Renderer(graph, device="cpu", batch_size=COUNT, num_threads=1, depth=1)
    renderer.submit(renderer.prepare(encoded, plan))
    assert torch.equal(renderer.collect(), direct)
