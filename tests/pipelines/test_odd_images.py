"""Every kind of image file comes out as Pillow shows it, in both renderings, or is a defined error."""

import io
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines import datasets, image_header, pretext, soundness
from pipelines.loading import Source, open_eval
from pipelines.manifest import Manifest
from pipelines.plan import View
from tests.pipelines import odd_images

KINDS = {
    f"{family}, {name}" if family else name: content
    for family, made in (
        ("JPEG", odd_images.jpegs()),
        ("PNG", odd_images.pngs()),
        ("BMP", odd_images.bmps()),
        ("", odd_images.others()),
    )
    for name, content in made
}
REFUSED = {name: (content, reason) for name, content, reason in odd_images.refused()}
# Decoders of one lossy format may round differently.
LOSSY = ("JPEG", "WebP, lossy", "TIFF, jpeg", "AVIF")
SIDE = 32


def shown(content: bytes) -> np.ndarray:
    """What torchvision's loader and Pillow's EXIF handling give."""
    with Image.open(io.BytesIO(content)) as image:
        try:
            upright = ImageOps.exif_transpose(image)
        except (SyntaxError, ValueError, KeyError):
            # Of garbage it makes no orientation, but an error.
            upright = image
        return np.asarray(upright.convert("RGB"))


def store(folder: Path, contents: list[bytes]) -> Manifest:
    """A class folder; the names' endings have nothing to do with the content."""
    (folder / "train/any").mkdir(parents=True)
    endings = itertools.cycle([".jpg", ".PNG", ".JPEG", ".webp", ".BMP", ".gif", ".tif", ".TIFF", ".ppm"])
    for number, (content, ending) in enumerate(zip(contents, endings, strict=False)):
        (folder / f"train/any/{number:04d}{ending}").write_bytes(content)
    found = datasets.load("folder", folder, "train")
    assert len(found) == len(contents)
    return found


def source(manifest: Manifest, **options: object) -> Source:
    # Cuts a square of 32 pixels out of the middle of a short side of 40, so that nothing is resized.
    view = View(SIDE, eval_crop=SIDE / odd_images.HEIGHT, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Source(manifest, view, pretext.load("none"), 0, **options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return store(tmp_path_factory.mktemp("odd"), list(KINDS.values()))


@pytest.fixture(scope="module", params=["dali", "torch"])
def rendered(request: pytest.FixtureRequest, stored: Manifest) -> dict[str, np.ndarray]:
    """(32, 32, 3) pixels of the middle of each kind."""
    middles = {}
    names = list(KINDS)
    for batch in open_eval(request.param, source(stored), batch_size=16, num_threads=1):
        assert batch.valid.sum() == min(16, len(names) - len(middles))
        for image, number, valid in zip(batch.images, batch.ids.tolist(), batch.valid.tolist(), strict=True):
            if valid:
                middles[names[number]] = (image * 255).permute(1, 2, 0).numpy()
    return middles


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_comes_out_as_pillow_shows_it(name: str, rendered: dict[str, np.ndarray]) -> None:
    want = shown(KINDS[name])
    y, x = (want.shape[0] - SIDE) // 2, (want.shape[1] - SIDE) // 2
    difference = np.abs(rendered[name] - want[y : y + SIDE, x : x + SIDE])
    assert difference.mean() < (0.5 if name.startswith(LOSSY) else 1e-4)
    assert difference.max() < (5 if name.startswith(LOSSY) else 1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_sizes_in_the_manifest_are_those_of_the_image_as_shown(stored: Manifest) -> None:
    want = {name: shown(content).shape[:2] for name, content in KINDS.items()}
    found = dict(zip(KINDS, zip(stored.heights.tolist(), stored.widths.tolist(), strict=True), strict=True))
    assert found == want
    assert set(found.values()) == {(40, 56), (56, 40)}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", KINDS)
def test_what_is_rewritten_is_the_picture_in_plain_pixels_and_the_rest_is_not_touched(name: str) -> None:
    content, want = KINDS[name], shown(KINDS[name])
    given = soundness.sound(content, *want.shape[:2])
    if given is content:
        header = image_header.parse(content)
        assert header is not None
        assert header.format in ("jpeg", "png", "webp", "bmp", "ppm")
    else:
        assert given == b"P6\n%d %d\n255\n" % want.shape[1::-1] + want.tobytes()


def test_ordinary_kinds_cost_no_second_decoder() -> None:
    ordinary = {
        "JPEG": ("4:2:0", "4:4:4", "progressive", "grey", "without JFIF", "MPO", *(f"EXIF {o}" for o in range(10))),
        "PNG": (
            "RGB",
            "RGBA",
            "grey",
            "palette",
            "palette with alpha",
            "interlaced",
            "EXIF 6",
            "EXIF behind the pixels",
        ),
        "WebP": ("lossy", "lossless", "lossy, RGBA", "profile"),
        "BMP": ("24 bits", "top row first"),
        "PPM": ("mode RGB",),
    }
    for name in (f"{family}, {kind}" for family, kinds in ordinary.items() for kind in kinds):
        assert soundness.sound(KINDS[name], *shown(KINDS[name]).shape[:2]) is KINDS[name], name


def test_kinds_that_dali_shows_otherwise_or_dies_of_never_reach_it() -> None:
    odd = (
        *("JPEG, two EXIF blocks", "JPEG, EXIF cut short", "JPEG, orientation in XMP", "JPEG, CMYK, not inverted"),
        *("PNG, grey of 16 bits", "PNG, EXIF as text", "PNG, animated, with a cover", "BMP, 16 bits", "GIF", "AVIF"),
        *("TIFF, mode 1", "TIFF, mode LAB", "PPM, up to 100", "WebP, lossy, XMP 6"),
    )
    for name in odd:
        assert soundness.sound(KINDS[name], *shown(KINDS[name]).shape[:2]).startswith(b"P6\n"), name


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_what_cannot_be_shown_is_left_out_with_its_reason(kind: str, tmp_path: Path) -> None:
    manifest = store(
        tmp_path, [odd_images.encode(odd_images.PICTURE, "PNG"), *(content for content, _ in REFUSED.values())]
    )
    batches = open_eval(kind, source(manifest, on_bad_image="skip"), batch_size=8, num_threads=1)
    assert sum(int(batch.valid.sum()) for batch in batches) == 1
    for number, (name, (_, reason)) in enumerate(REFUSED.items(), 1):
        assert f"{number:04d}." in batches.skipped[number], name
        assert re.search(reason, batches.skipped[number]), name


def test_a_declared_size_over_the_limit_is_refused_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    for name, (content, _) in REFUSED.items():
        if "bomb" in name:
            header = image_header.parse(content)
            size = (header.height, header.width) if header else (0, 0)
            with pytest.raises(soundness.UnsoundError, match=r"more than|refused"):
                soundness.sound(content, *size)


def test_the_limit_is_the_one_of_pillow() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert image_header.MOST_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (2000, 1)])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM"])
def test_tiny_and_thin_images_pass(size: tuple[int, int], form: str) -> None:
    content = odd_images.encode(odd_images.PICTURE.resize(size), form)
    given = soundness.sound(content, size[1], size[0])
    assert shown(given).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_an_image_of_a_hundred_megapixels_is_rendered(kind: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (12_500, 8_000), (200, 100, 50))
    manifest = store(tmp_path, [odd_images.encode(picture, "JPEG", quality=50)])
    (batch,) = open_eval(kind, source(manifest), batch_size=1, num_threads=1)
    assert np.abs(batch.images[0].numpy() * 255 - np.array([200, 100, 50])[:, None, None]).max() < 3
    shutil.rmtree(tmp_path / "train")
