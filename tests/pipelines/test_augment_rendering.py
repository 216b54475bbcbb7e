"""Each operation in the host's kernel and in DALI's stock operators, against torchvision's functional transforms.

Measured over drawn pictures at every level that an augmentation draws: the kernel is equal to the last bit, over 270
million pixels. The stock operators: see the bounds below.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn, types

from pipelines import pretext, torch_reference
from pipelines.augment.levels import STANDARD, WIDE
from pipelines.augment.operations import Operation
from pipelines.dali import augment as stock
from pipelines.kernels.augment import apply
from pipelines.plan import View, train_plan
from tests.pipelines.conftest import draw

SIZE = 64
ON_PIXELS = [operation for operation in Operation if operation not in (Operation.NOTHING, Operation.ERASE)]
# Share of the values that may differ, by how much they may, and by how much on average. Where pixels move, two can be
# equally near; torch cuts numbers where DALI rounds them; and DALI equalizes as OpenCV does, torch as Pillow.
BOUNDS = {
    Operation.SHEAR_X: (0.01, 255, 0.2),
    Operation.SHEAR_Y: (0.01, 255, 0.2),
    Operation.ROTATE: (0.01, 255, 0.1),
    Operation.BRIGHTNESS: (0.02, 1, 0.02),
    Operation.CONTRAST: (0.02, 1, 0.02),
    Operation.SATURATION: (0.03, 1, 0.03),
    Operation.SHARPNESS: (0.01, 1, 0.01),
    Operation.AUTO_CONTRAST: (0.03, 1, 0.03),
    Operation.HUE: (0.01, 1, 0.01),
    Operation.EQUALIZE: (1.0, 24, 6.0),
}


def cases_of(operation, size=SIZE):
    """(M, 4) amounts: every level of the automatic augmentations, both signs, and some between them."""
    generator = np.random.default_rng(0)
    if operation is Operation.LIGHTING:
        return generator.normal(0, 10, (12, 4)).astype(np.float32)
    if operation is Operation.HUE:
        drawn = np.linspace(-0.5, 0.5, 13)
    else:
        spaces = ((STANDARD, 10), (STANDARD, 31), (WIDE, 31))
        bins = [(space, num, np.tile(np.arange(num), 2)) for space, num in spaces]
        drawn = np.unique(
            np.concatenate(
                [
                    space.amounts(np.full(2 * num, operation), which, np.arange(2 * num) < num, num, size)[:, 0]
                    for space, num, which in bins
                ]
            )
        )
    if operation is Operation.ROTATE:
        drawn = np.concatenate([drawn, [90, -90, 180], generator.uniform(-180, 180, 10)])
    amounts = np.zeros((len(drawn), 4), np.float32)
    amounts[:, 0] = drawn
    return amounts


def pictures(count, size=SIZE, hard=True):
    """At least `count`: drawn ones, and some that are hard: noise, one colour, two values."""
    noise = np.random.default_rng(1).integers(0, 256, (size, size, 3), np.uint8)
    one, two = np.full((size, size, 3), (7, 7, 90), np.uint8), np.where(noise > 99, 255, 254).astype(np.uint8)
    drawn = [np.asarray(draw(number, size, size)) for number in range(3)]
    return (drawn + [noise, one, two] * hard) * (1 + count // 3)


def expected(pixels, operation, amounts):
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
    return torch_reference.apply(image, operation, amounts).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("operation", ON_PIXELS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("size", [33, 64])
def test_the_kernel_does_what_torchvision_does_to_the_last_bit(operation, size):
    scratch, cases, differing = np.empty((size, size, 3), np.uint8), cases_of(operation, size), 0
    images = pictures(len(cases), size)[: max(6, len(cases))]
    for number, pixels in enumerate(images):
        mine, amounts = pixels.copy(), cases[number % len(cases)]
        apply(mine, int(operation), amounts, scratch)
        differing += int((mine != expected(pixels, operation, amounts)).any(axis=2).sum())
    # A torch that multiplies matrices in another order may take the other of two pixels that are equally near.
    assert differing <= (len(images) * size * size // 1000 if operation <= Operation.ROTATE else 0)


@pytest.mark.parametrize("code", [Operation.NOTHING, Operation.ERASE, 99])
def test_the_kernel_leaves_alone_what_is_not_its_business(code):
    pixels = np.asarray(draw(0, SIZE, SIZE)).copy()
    before = pixels.copy()
    apply(pixels, int(code), np.full(4, 3, np.float32), np.empty_like(pixels))
    np.testing.assert_array_equal(pixels, before)


def test_the_kernel_draws_nothing_over_the_end_of_its_buffers():
    buffers = np.full((2, SIZE * SIZE * 3 + 64), 77, np.uint8)
    pixels, scratch = (buffer[32:-32].reshape(SIZE, SIZE, 3) for buffer in buffers)
    for operation in ON_PIXELS:
        for amounts in cases_of(operation):
            pixels[:] = draw(1, SIZE, SIZE)
            apply(pixels, int(operation), amounts, scratch)
    assert (buffers[:, :32] == 77).all()
    assert (buffers[:, -32:] == 77).all()


def planned(operations, amounts):
    count = len(operations)
    ids, sides = np.arange(count), np.full(count, SIZE)
    plan = train_plan(View(size=SIZE), pretext.load("none"), 0, np.zeros(count, np.int64), ids, sides, sides)
    return replace(plan, ops=np.array(operations, np.int64)[:, None], amounts=np.array(amounts, np.float32)[:, None])


def pipeline_of(slot, count, device):
    pipeline = Pipeline(batch_size=count, num_threads=1, device_id=None, exec_dynamic=True)
    with pipeline:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
        pipeline.set_outputs(stock.apply(images.gpu() if device == "gpu" else images, slot, 0, device))
    return pipeline


def rendered(slot, plan, images):
    pipeline = pipeline_of(slot, len(images), "cpu")
    pipeline.build()
    pipeline.feed_input("images", images)
    for name, values in stock.prepare((slot,), plan).items():
        pipeline.feed_input(name, values)
    return [np.asarray(image) for image in pipeline.run()[0]]


@pytest.mark.parametrize("operation", ON_PIXELS, ids=lambda operation: operation.name)
def test_stock_operators_come_as_near_to_torchvision_as_is_said(operation):
    amounts = cases_of(operation)
    # Equalizing two values, one formula gives them back and the other makes them black and white.
    images = pictures(len(amounts), hard=operation is not Operation.EQUALIZE)[: len(amounts)]
    found = rendered(frozenset([operation]), planned([operation] * len(amounts), amounts), images)
    wanted = [expected(pixels, operation, row) for pixels, row in zip(images, amounts, strict=True)]
    difference = np.abs(np.stack(found).astype(int) - np.stack(wanted))
    share, most, mean = BOUNDS.get(operation, (0, 0, 0))
    assert (difference > 0).mean() <= share
    assert difference.max() <= most
    assert difference.mean() <= mean


def test_in_a_slot_of_all_operations_each_sample_gets_its_own():
    """So that what one of them leaves behind for the others is nothing."""
    rows = [(operation, cases_of(operation)[-2 % len(cases_of(operation))]) for operation in ON_PIXELS]
    rows += [(Operation.NOTHING, np.ones(4, np.float32))]
    operations, amounts = zip(*rows, strict=True)
    images = [np.asarray(draw(number, SIZE, SIZE)) for number in range(len(rows))]
    found = rendered(frozenset(ON_PIXELS), planned(operations, amounts), images)
    for operation, row, image, pixels in zip(operations, amounts, found, images, strict=True):
        difference = np.abs(image.astype(int) - expected(pixels, operation, row))
        assert difference.mean() <= max(0.02, 4 * BOUNDS.get(operation, (0, 0, 0))[2]), operation.name
    np.testing.assert_array_equal(found[-1], images[-1])


def test_the_operators_for_a_gpu_are_put_together_where_there_is_none():
    assert len(pipeline_of(frozenset(ON_PIXELS), 2, "gpu").serialize()) > 1000


def test_stock_operators_erase_rectangles_and_nothing_where_none_is_drawn():
    plan = planned([Operation.ERASE, Operation.NOTHING], [[3, 5, 20, 7], [0, 0, 0, 0]])
    pipeline = Pipeline(batch_size=2, num_threads=1, device_id=None, exec_dynamic=True)
    with pipeline:
        images = fn.external_source(name="images", dtype=types.FLOAT, ndim=3, layout="HWC")
        pipeline.set_outputs(stock.erase(images, 0, [0.0]))
    pipeline.build()
    pipeline.feed_input("images", [np.ones((SIZE, SIZE, 3), np.float32)] * 2)
    for name, values in stock.prepare((frozenset([Operation.ERASE]),), plan).items():
        pipeline.feed_input(name, values)
    first, second = (np.asarray(image) for image in pipeline.run()[0])
    wanted = np.ones((SIZE, SIZE, 3))
    wanted[3:23, 5:12] = 0
    np.testing.assert_array_equal(first, wanted)
    assert (second == 1).all()
