import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines import masks
from pipelines.drawing import background, objects, raster, scene, shapes

NAMES = list(objects.OBJECTS)
SIZE = 48
# A size at which the shapes are cheap to draw and still have their details; 12 classes take turns.
COUNT = 12 * 25

DIGESTS = """
import hashlib
import numpy as np
from pipelines.drawing import files, objects, scene
drawn = scene.numbers(0, "train", np.arange(12))
pixels, jpegs = hashlib.sha256(), hashlib.sha256()
for name, numbers in zip(objects.OBJECTS, drawn, strict=True):
    picture = scene.draw(name, 64, numbers)
    jpeg, mask = files.encode(picture)
    pixels.update(picture.pixels.tobytes() + mask)
    jpegs.update(jpeg)
print(pixels.hexdigest()[:32], jpegs.hexdigest()[:32])
"""
PIXELS = "7b6e0867d52dab264863ebb759c50f37"
JPEGS = "8c36d74974c9f76b054e204966d052a8"


@pytest.fixture(scope="module")
def scenes() -> list[scene.Scene]:
    drawn = scene.numbers(1, "train", np.arange(COUNT))
    return [scene.draw(NAMES[index % 12], SIZE, numbers) for index, numbers in enumerate(drawn)]


@pytest.mark.parametrize(
    "machine",
    [{}, {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR", "JSIMD_FORCENONE": "1"}],
    ids=["as it is", "without vector instructions"],
)
def test_the_same_seed_gives_the_same_bytes_on_every_machine(machine: dict[str, str]) -> None:
    """If the drawing changes on purpose, raise `demo.VERSION` with these."""
    environment = os.environ | machine | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run([sys.executable, "-c", DIGESTS], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [PIXELS, JPEGS]


def test_every_object_is_inside_the_picture_and_of_the_promised_size(scenes: list[scene.Scene]) -> None:
    boxes, found = masks.enclosing_boxes(np.stack([drawn.mask for drawn in scenes]))
    assert found.all()
    sides = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) / SIZE
    assert sides.min() >= scene.SHARE[0] - 0.06
    assert sides.max() <= scene.SHARE[1] + 0.06
    assert sides.max() - sides.min() > 0.25


def test_a_box_in_the_middle_is_a_poor_guess(scenes: list[scene.Scene]) -> None:
    boxes, _ = masks.enclosing_boxes(np.stack([drawn.mask for drawn in scenes]))
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    hits = []
    for side in range(8, SIZE + 1, 2):
        low, high = (SIZE - side) / 2, (SIZE + side) / 2
        overlap = (np.minimum(boxes[:, 2:], high) - np.maximum(boxes[:, :2], low)).clip(0).prod(axis=1)
        hits.append(np.mean(overlap / (areas + side * side - overlap) >= 0.5))
    assert max(hits) < 0.45


def test_a_quarter_turn_shows_in_the_silhouette_of_every_class(scenes: list[scene.Scene]) -> None:
    """An upright silhouette is nearer to another of its class than a turned one is."""
    silhouettes = np.stack([_fitted(drawn.mask) for drawn in scenes])
    upright = {}
    for label, name in enumerate(NAMES):
        own = silhouettes[label::12]
        nearest = []
        for turn in (0, 1, 3):
            distances = ((np.rot90(own, turn, (1, 2))[:, None] - own[None]) ** 2).sum(axis=(2, 3))
            np.fill_diagonal(distances, np.inf)
            nearest.append(distances.min(axis=1))
        upright[name] = float(np.mean(np.argmin(nearest, axis=0) == 0))
    assert min(upright.values()) >= 0.8, upright


def test_objects_stand_out_from_their_background(scenes: list[scene.Scene]) -> None:
    grey = [drawn.pixels @ np.array([0.299, 0.587, 0.114]) for drawn in scenes]
    differences = [
        abs(image[drawn.mask].mean() - image[~drawn.mask].mean()) for image, drawn in zip(grey, scenes, strict=True)
    ]
    assert np.percentile(differences, 5) > 30


def test_mean_colour_tells_nothing_about_the_class() -> None:
    from sklearn.linear_model import LogisticRegression

    drawn = scene.numbers(2, "train", np.arange(600))
    colours = np.stack(
        [scene.draw(NAMES[index % 10], 24, drawn[index]).pixels.mean(axis=(0, 1)) for index in range(600)]
    )
    labels = np.arange(600) % 10
    features = (colours - 128) / 64
    model = LogisticRegression(max_iter=500).fit(features[:400], labels[:400])
    assert model.score(features[400:], labels[400:]) < 0.25


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [scene.MIN_SIZE, 33, 224])
def test_any_size_can_be_drawn_and_the_mask_covers_the_object_alone(name: str, size: int) -> None:
    numbers = scene.numbers(3, "val", np.array([7]))[0]
    drawn = scene.draw(name, size, numbers)
    assert drawn.pixels.shape == (size, size, 3)
    assert drawn.pixels.dtype == np.uint8
    share = drawn.mask.mean()
    assert 0.02 < share < 0.65


def test_the_mask_is_where_drawing_the_object_changed_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = scene.numbers(4, "train", np.arange(12))
    whole = [scene.draw(name, 96, own) for name, own in zip(NAMES, numbers, strict=True)]
    untouched = []
    monkeypatch.setattr(scene, "place", lambda layers, *_, **__: [[np.full((3, 2), -9.0)] for _ in layers])
    for name, own in zip(NAMES, numbers, strict=True):
        untouched.append(scene.draw(name, 96, own).pixels.astype(int))
    for drawn, bare in zip(whole, untouched, strict=True):
        changed = np.abs(drawn.pixels.astype(int) - bare).max(axis=2) > 0
        assert (changed | ~drawn.mask).mean() > 0.995
        # Beyond the mask only the antialiased rim, and what is too thin to cover half a pixel.
        grown = raster.widen(raster.Patch(0, 0, drawn.mask.astype(np.int32)), 1, 96, 96).amount > 0
        assert (changed & ~grown).mean() < 0.005


def test_streams_of_different_splits_and_seeds_differ_and_a_sample_depends_on_its_id_alone() -> None:
    ids = np.array([3, 11])
    base = scene.numbers(0, "train", ids)
    assert (scene.numbers(0, "train", np.arange(20))[ids] == base).all()
    for other in (scene.numbers(0, "val", ids), scene.numbers(1, "train", ids), scene.numbers(0, "train", ids + 1)):
        assert not (other == base).any()


corner = st.tuples(st.floats(-5, 45), st.floats(-5, 35))


@settings(max_examples=40)
@given(st.lists(corner, min_size=3, max_size=3))
def test_coverage_of_a_triangle_is_the_share_of_points_inside(corners: list[tuple[float, float]]) -> None:
    fine = 16
    y, x = ((np.mgrid[0 : 30 * fine, 0 : 40 * fine] + 0.5) / fine)[:]
    sides = [
        (x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=False)
    ]
    inside = np.all([side > 0 for side in sides], axis=0) | np.all([side < 0 for side in sides], axis=0)
    truth = inside.reshape(30, fine, 40, fine).mean(axis=(1, 3))
    amount = np.zeros((30, 40))
    patch = raster.cover([shapes.polygon(*corners)], 30, 40)
    patch.of(amount)[:] = patch.amount / raster.FULL
    # Four lines a pixel are off by at most 1/8 at each of two edges, the points by 1/32.
    assert np.abs(amount - truth).max() <= 2 * (1 / 8 + 1 / 32) + 1 / 64


@settings(max_examples=40)
@given(st.floats(6, 24), st.floats(6, 24), st.floats(1, 5.5), st.floats(1, 5.5))
def test_coverage_adds_up_to_the_area(x: float, y: float, across: float, down: float) -> None:
    def area(contours: list[np.ndarray]) -> float:
        return float(raster.cover(contours, 30, 30).amount.sum()) / raster.FULL

    box = shapes.rectangle(x - across, y - down, x + across, y + down)
    assert area([box]) == pytest.approx(4 * across * down, rel=0.2)
    round_one = shapes.ellipse(x, y, across, down)
    assert area([round_one]) == pytest.approx(np.pi * across * down, rel=0.2)
    inner = shapes.ellipse(x, y, across - 0.9, down - 0.9)
    around = shapes.rectangle(x - across - 2, y - down - 2, x + across + 2, y + down + 2)
    assert area([around, inner]) == area([around])
    hole = area(shapes.ring(x, y, across, down, 0.5))
    assert hole == pytest.approx(area([round_one]) - area([shapes.ellipse(x, y, across - 0.5, down - 0.5)]), abs=1e-9)


def test_whole_pixels_are_covered_exactly_and_paint_blends() -> None:
    patch = raster.cover([shapes.rectangle(2, 1, 4.5, 3)], 5, 6)
    picture = np.zeros((3, 5, 6), np.int32)
    raster.paint(picture, patch, np.array([200, 100, 0])[:, None, None])
    assert [picture[:, y, x].tolist() for y in (1, 2) for x in (2, 3)] == [[200, 100, 0]] * 4
    assert [picture[:, y, 4].tolist() for y in (1, 2)] == [[100, 50, 0]] * 2
    assert picture.sum() == 4 * 300 + 2 * 150


def test_widening_grows_by_whole_pixels_and_stays_inside() -> None:
    patch = raster.cover([shapes.rectangle(0, 2, 1, 3)], 6, 6)
    wide = raster.widen(patch, 1, 6, 6)
    picture = np.zeros((6, 6), int)
    wide.of(picture)[:] = wide.amount // raster.FULL
    assert picture.tolist() == [[0] * 6, *[[1, 1, 0, 0, 0, 0]] * 3, [0] * 6, [0] * 6]


@pytest.mark.parametrize("kind", range(len(background.KINDS)))
def test_every_background_is_a_texture_in_range(kind: int) -> None:
    numbers = np.random.default_rng(kind).random(background.NUMBERS)
    numbers[0] = (kind + 0.5) / len(background.KINDS)
    drawn = background.draw(40, np.array([[0.0, 80, 255], [60, 160, 255]]), numbers)
    assert drawn.shape == (3, 40, 40)
    assert 0 <= drawn.min() <= drawn.max() <= 255
    assert drawn[1].std() > 3


def _fitted(mask: np.ndarray) -> np.ndarray:
    """The object cut out, centred on a square and shrunk to 24 x 24."""
    (left, top, right, bottom), _ = (part[0] for part in masks.enclosing_boxes(mask[None]))
    cut = mask[int(top) : int(bottom), int(left) : int(right)]
    side = max(cut.shape)
    square = np.zeros((side, side), np.uint8)
    y, x = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
    square[y : y + cut.shape[0], x : x + cut.shape[1]] = cut * 255
    return np.asarray(Image.fromarray(square).resize((24, 24), Image.Resampling.BOX), np.float64)
