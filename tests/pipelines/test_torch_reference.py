"""The oracle itself, against torchvision's own classes and Pillow."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from pipelines import augment, pretext, torch_reference
from pipelines.augment.operations import Operation
from pipelines.errors import LorotError
from pipelines.plan import Plan, View, train_plan
from tests.pipelines.conftest import draw

UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def plan_of(view: View, task: str = "none", count: int = 1) -> Plan:
    ids, sides = np.arange(count), np.full(count, view.size)
    return train_plan(view, pretext.load(task), 0, np.zeros(count, np.int64), ids, sides, sides)


@pytest.mark.parametrize("kind", [v2.RandAugment, v2.AutoAugment, v2.TrivialAugmentWide])
def test_operations_do_what_torchvisions_classes_do(kind):
    """Their own choices, recorded while they make them, put into a plan."""
    recorded = []

    class Recording(kind):
        def _apply_image_or_video_transform(self, image, transform_id, magnitude, interpolation, fill):
            recorded.append((transform_id, magnitude))
            return super()._apply_image_or_video_transform(image, transform_id, magnitude, interpolation, fill)

    names = {"Color": "SATURATION", "Identity": "NOTHING"}
    image = torch.from_numpy(np.asarray(draw(3, 64, 64)).copy()).permute(2, 0, 1)
    torch.manual_seed(1)
    for _ in range(60):
        recorded.clear()
        expected, found = Recording()(image), image
        for name, magnitude in recorded:
            spelt = "".join("_" * letter.isupper() + letter for letter in name).strip("_").upper()
            operation = Operation[names.get(name, spelt)]
            if operation in (Operation.BRIGHTNESS, Operation.SATURATION, Operation.CONTRAST, Operation.SHARPNESS):
                magnitude += 1.0
            amount = 255 * magnitude if operation is Operation.SOLARIZE else magnitude
            found = torch_reference.apply(found, operation, np.array([amount, 0, 0, 0], np.float32))
        # Amounts are float32 here, not float64: that decides which side of a whole number a few values fall on.
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.05


def test_lighting_adds_to_each_channel_and_stays_within_8_bits():
    image = torch.tensor([0, 100, 254], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 2, 2)
    moved = torch_reference.apply(image, Operation.LIGHTING, [-3.0, 2.6, 7.0, 99.0])
    assert moved[:, 0, 0].tolist() == [0, 103, 255]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_an_erased_rectangle_has_the_mean_colour_and_is_turned_with_the_rest(dtype):
    view = View(size=8, crop="whole", flip=False)
    plan = replace(
        plan_of(view, "rotation"),
        ops=np.array([[Operation.ERASE]]),
        amounts=np.array([[[1, 2, 3, 5]]], np.float32),
        turns=np.array([1]),
    )
    pixels = np.full((8, 8, 3), 200, np.uint8)
    image = torch_reference.render_batch([pixels], view, plan, dtype=dtype)[0]
    assert image.dtype == getattr(torch, dtype)
    erased = torch.zeros(8, 8, dtype=torch.bool)
    erased[1:4, 2:7] = True
    erased = torch.rot90(erased, 1)
    mean = [round(255 * part) for part in view.mean] if dtype == "uint8" else [0, 0, 0]
    for channel, value in zip(image.float(), mean, strict=True):
        assert (channel[erased] == value).all()
        assert (channel[~erased] > value).all()


def test_8_bits_are_what_is_normalised():
    view = View(size=32, augment=(augment.load("rand_augment"), augment.load("random_erasing")))
    plan = plan_of(view, "lorot_i", count=20)
    samples = [np.asarray(draw(n, 32, 32)) for n in range(20)]
    plain = torch_reference.render_batch(samples, view, plan, dtype="uint8")
    mean, std = (torch.tensor(part)[:, None, None] * 255 for part in (view.mean, view.std))
    normalised = torch_reference.render_batch(samples, view, plan)
    # Erased: the mean colour is no whole number of 8 bits.
    kept = normalised != 0
    assert kept.float().mean() > 0.8
    torch.testing.assert_close(normalised[kept], ((plain.float() - mean) / std)[kept], rtol=0, atol=0)
    for dtype in ("float16", "bfloat16"):
        assert torch.equal(
            torch_reference.render_batch(samples, view, plan, dtype=dtype), normalised.to(getattr(torch, dtype))
        )


def test_the_plans_size_counts_not_the_views():
    view = View(size=32)
    plan = plan_of(replace(view, size=48), count=2)
    samples = [np.asarray(draw(n, 48, 48)) for n in range(2)]
    assert torch_reference.render_batch(samples, view, plan).shape == (2, 3, 48, 48)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_decoded_as_it_is_shown_from_bytes_or_an_array_of_them(orientation):
    picture, file = draw(orientation, 20, 30), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(file, "PNG", exif=exif)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))
    for encoded in (file.getvalue(), np.frombuffer(file.getvalue(), np.uint8)):
        np.testing.assert_array_equal(torch_reference.decode(encoded), expected)


def test_an_unknown_type_is_an_error_that_names_those_there_are():
    with pytest.raises(LorotError, match="float32, float16, bfloat16, uint8"):
        torch_reference.renderer(View(size=8), True, "float64")
