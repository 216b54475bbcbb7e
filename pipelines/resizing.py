"""What becomes of one image when a data set is prepared: its new size, its pixels and its file."""

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from pipelines.errors import LorotError
from pipelines.soundness import UnsoundError, sound

RESIZES = ("short", "long", "none")
FORMATS = ("auto", "jpeg", "png")
# How many times larger than asked for an image may come out of a decoder that shrinks while it decodes: what it does
# then, exactly by powers of two, is no longer seen after the filter that does the rest.
_GAP = 2
_ORIENTATION = 0x0112
# Where Pillow puts what it finds of EXIF in JPEG and PNG files.
_EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


@dataclass(frozen=True)
class Recipe:
    """How images are prepared.

    Attributes:
        resize: "short": the short side becomes `size`; "long": the long side; "none": neither. Nothing is enlarged.
        size: pixels.
        quality: of JPEG files, 1 to 100.
        format: "jpeg" or "png"; "auto": JPEG for what comes from files, PNG (exact) for what comes from an array. An
            image that stays as it is keeps its bytes, and so its format, if it is a JPEG or PNG file.
    """

    resize: str = "short"
    size: int = 256
    quality: int = 90
    format: str = "auto"

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise LorotError(f"resize {self.resize!r} does not exist; there are {', '.join(RESIZES)}")
        if self.format not in FORMATS:
            raise LorotError(f"format {self.format!r} does not exist; there are {', '.join(FORMATS)}")
        if self.size < 1:
            raise LorotError(f"size {self.size}: write the pixels of a side, as 256")
        if not 1 <= self.quality <= 100:
            raise LorotError(f"quality {self.quality}: write 1 to 100, as 90")

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what becomes of an image: at least 1, the ratio kept up to half a pixel."""
        side = {"short": min(height, width), "long": max(height, width), "none": 0}[self.resize]
        if side <= self.size:
            return height, width
        return (
            self.size if height == side else max(1, round(height * self.size / side)),
            self.size if width == side else max(1, round(width * self.size / side)),
        )


class Picture(NamedTuple):
    """A prepared image: its file, the file's ending ("jpg", "png"), and its size in pixels."""

    content: bytes
    ending: str
    height: int
    width: int


def prepare_file(encoded: bytes, height: int, width: int, recipe: Recipe) -> Picture:
    """An encoded image, resized, upright (the orientation in its EXIF applied) and in RGB; grey JPEG and PNG stay grey.

    Args:
        height, width: pixels of the image as shown, as the manifest has them.

    Raises:
        UnsoundError: it is damaged, not of that height and width, or does not fit into the file's format.
    """
    readable = sound(encoded, height, width)
    target = recipe.fitted(height, width)
    try:
        with Image.open(io.BytesIO(readable)) as image:
            orientation = image.getexif().get(_ORIENTATION, 1) if _EXIF & image.info.keys() else 1
            plain = readable is encoded and image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L")
            fits = image.format == "JPEG" or recipe.format != "jpeg"
            if plain and fits and orientation == 1 and target == (height, width):
                return Picture(encoded, "jpg" if image.format == "JPEG" else "png", height, width)
            if target != (height, width):
                # Orientations from 5 on are those of an image that is stored lying on its side.
                stored = target if orientation >= 5 else target[::-1]
                image.draft(None, (stored[0] * _GAP, stored[1] * _GAP))
            upright = ImageOps.exif_transpose(image) if orientation != 1 else image
            decoded = upright if plain or upright.mode == "RGB" else upright.convert("RGB")
            decoded.load()
    except MemoryError:  # It says nothing about the image.
        raise
    except Exception as error:  # What Pillow can raise on damaged files is not written anywhere.
        raise UnsoundError(f"the file is damaged: {str(error) or type(error).__name__}") from None
    # Not in there: a fault of the code that resizes is not one of the image.
    return _finish(decoded, target, recipe, "jpg")


def prepare_pixels(pixels: np.ndarray, recipe: Recipe) -> Picture:
    """(H, W, 3) uint8 pixels, resized and encoded."""
    return _finish(Image.fromarray(pixels), recipe.fitted(*pixels.shape[:2]), recipe, "png")


def prepare_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A (H, W) bool mask as (height, width): each pixel is that of the source at its centre."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * (old / new)).astype(np.int64), old - 1)
        for new, old in ((height, mask.shape[0]), (width, mask.shape[1]))
    )
    nearest: np.ndarray = mask[rows[:, None], columns[None, :]]
    return nearest


def prepare_boxes(boxes: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """(M, 4) float32 half-open boxes (x_min, y_min, x_max, y_max), as their image goes from `old` to `new` (H, W)."""
    by = np.array([new[1] / old[1], new[0] / old[0]] * 2)
    scaled: np.ndarray = (boxes * by).astype(np.float32)
    return scaled


def _finish(image: Image.Image, target: tuple[int, int], recipe: Recipe, usual: str) -> Picture:
    """The file of an image in RGB or grey, resized if it is not of the target's (height, width).

    Args:
        usual: the ending for format "auto".
    """
    if image.size != target[::-1]:
        image = _resized(image, *target)
    # Profiles and comments of the source, which Pillow would pass on.
    image.info.clear()
    ending = {"auto": usual, "jpeg": "jpg", "png": "png"}[recipe.format]
    file = io.BytesIO()
    try:
        if ending == "jpg":
            interval = _restart_interval(image)
            image.save(file, "JPEG", quality=recipe.quality, subsampling="4:2:0", restart_marker_blocks=interval)
        else:
            (image.convert("RGB") if image.mode == "RGBX" else image).save(file, "PNG")
    except MemoryError:
        raise
    except Exception as error:  # As of reading: a side above 65,500 pixels, for one, is an OSError.
        form = "JPEG" if ending == "jpg" else "PNG"
        raise UnsoundError(f"cannot be written as {form}: {str(error) or type(error).__name__}") from None
    return Picture(file.getvalue(), ending, *target)


def _restart_interval(image: Image.Image) -> int:
    """Blocks between two restart markers: a row is a whole number of intervals, as short as pays.

    By these markers a window's part of the file is found without decoding the rest (`kernels.excerpt`). Two blocks are
    32 pixels of a picture in colour; the markers cost 3 % of the file then, and 7 % where a row has an odd number.
    """
    across = 8 if image.mode == "L" else 16
    return 1 + (-(-image.width // across) + 1) % 2


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    # Compiled code is loaded for those who resize, and not for those who read what was.
    from pipelines.kernels.reduction import resized

    if image.mode == "L":
        return Image.fromarray(resized(np.asarray(image.convert("RGB")), height, width)[:, :, 0])
    pixels = resized(_pixels(image), height, width)
    if pixels.shape[2] == 3:
        return Image.fromarray(pixels)
    # Pillow takes pixels of four bytes without a copy.
    return Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)


def _pixels(image: Image.Image) -> np.ndarray:
    """An RGB image as (H, W, 4) uint8, as Pillow holds it and without a copy; or (H, W, 3)."""
    image.load()
    try:
        values = pa.array(image)
    except ValueError:
        # It lies in several blocks of memory.
        return np.asarray(image)
    pixels: np.ndarray = np.frombuffer(values.values.buffers()[1], np.uint8).reshape(image.height, image.width, 4)
    return pixels
