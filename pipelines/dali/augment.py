"""The operations of `augment.operations` in DALI's stock operators, for the device graph.

Every sample goes through the same operators, with amounts that change nothing where its operation is another one: no
branches, so that the graph is the same whatever is drawn, and a GPU passes over 8-bit images a few times more. Only
operators for what a slot allows are there. What cannot be had exactly is bounded in the tests: DALI equalizes as
OpenCV does, not as Pillow; numbers that torch cuts may differ by 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types

from pipelines.augment.operations import Operation
from pipelines.plan import Plan

_GEOMETRIC = (
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
    Operation.ROTATE,
)
_BLENDS = (Operation.BRIGHTNESS, Operation.SATURATION, Operation.CONTRAST, Operation.AUTO_CONTRAST)
_MASKS = (Operation.POSTERIZE, Operation.SOLARIZE, Operation.INVERT)
_BLUR = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
_GREY = np.array([0.2989, 0.587, 0.114], np.float32)
# DALI rounds where torch cuts. A little less than a half, lest a whole number falls below itself.
_CUT = 0.499
# torchvision cuts numbers up to 1 to bytes after multiplying them by a little less than 256.
_TO_BYTE = (256.0 - 1e-3) / 255.0


def prepare(slots: tuple[frozenset[Operation], ...], plan: Plan) -> dict[str, np.ndarray]:
    """What `apply` and `erase` need of a plan, by the names of the graph's inputs."""
    inputs: dict[str, np.ndarray] = {}
    for number, allowed in enumerate(slots):
        codes, amounts = plan.ops[:, number], plan.amounts[:, number]
        for kind, wanted, values in (
            ("warp", _GEOMETRIC, _warps),
            ("shift", (Operation.LIGHTING,), _shifts),
            ("shares", _BLENDS, _shares),
            ("sharpness", (Operation.SHARPNESS,), _rests),
            ("equalized", (Operation.EQUALIZE,), _equalized),
            ("mask", _MASKS, _masks),
            ("threshold", _MASKS, _thresholds),
            ("hue", (Operation.HUE,), _hues),
            ("erased", (Operation.ERASE,), _erased),
        ):
            if allowed & set(wanted):
                inputs[f"{kind}_{number}"] = values(codes, amounts, plan.size)
    return inputs


def apply(images: Any, allowed: frozenset[Operation], number: int, device: str) -> Any:
    """Images (S, S, 3) uint8 after operation `number` of their plan, inside a pipeline; ERASE is not done here."""

    def given(kind: str, dtype: Any, ndim: int, moved: bool = True) -> Any:
        values = fn.external_source(name=f"{kind}_{number}", dtype=dtype, ndim=ndim)
        return values.gpu() if moved and device == "gpu" else values

    if allowed & set(_GEOMETRIC):
        matrix = given("warp", types.FLOAT, 2, moved=False)
        images = fn.warp_affine(images, matrix=matrix, interp_type=types.INTERP_NN, fill_value=0, inverse_map=True)
    if Operation.SHARPNESS in allowed:
        images = _sharpen(images, given("sharpness", types.FLOAT, 0))
    if Operation.EQUALIZE in allowed:
        chosen = given("equalized", types.UINT8, 0)
        kept = types.Constant(1, dtype=types.UINT8) - chosen
        images = fn.equalize(images) * chosen + images * kept
    if Operation.HUE in allowed:
        images = _turn_hue(images, given("hue", types.FLOAT, 0))
    if Operation.LIGHTING in allowed:
        images = fn.cast(images + given("shift", types.FLOAT, 1), dtype=types.UINT8)
    if allowed & set(_BLENDS):
        images = _blend(images, given("shares", types.FLOAT, 1), Operation.AUTO_CONTRAST in allowed)
    if allowed & set(_MASKS):
        threshold = given("threshold", types.INT16, 0)
        images = images ^ fn.cast((images >= threshold) * types.Constant(255, dtype=types.UINT8), dtype=types.UINT8)
        images = images & given("mask", types.UINT8, 0)
    return images


def erase(images: Any, number: int, fill: Sequence[float]) -> Any:
    """Images with the rectangles of operation `number` set to `fill` (of R, G, B, or of all), inside a pipeline."""
    box = fn.external_source(name=f"erased_{number}", dtype=types.FLOAT, ndim=1)
    return fn.erase(images, anchor=box[0:2], shape=box[2:4], axes=(0, 1), fill_value=fill)


def _sharpen(images: Any, rest: Any) -> Any:
    """Towards a 3 x 3 blur with 5 in the middle by the share `rest`; the outermost pixels stay as they are."""
    blurred = fn.filter(images, types.Constant(_BLUR, device=images.device), mode="valid")
    inner = fn.cast(images[1:-1, 1:-1], dtype=types.FLOAT)
    moved = _cut(inner + (blurred - inner) * rest)
    places = types.Constant(np.array([[0, 0], [1, 1]], np.int32))
    return fn.multi_paste(images, moved, out_anchors=places, output_size=images.shape(dtype=types.INT32)[0:2])


def _cut(values: Any) -> Any:
    return fn.cast(values - _CUT, dtype=types.UINT8)


def _turn_hue(images: Any, sixths: Any) -> Any:
    """Move the hue, of which the colour circle has six sixths; through hue, saturation and value."""
    red, green, blue = (fn.cast(images[:, :, channel : channel + 1], dtype=types.FLOAT) for channel in range(3))
    value = math.max(math.max(red, green), blue)
    reach = value - math.min(math.min(red, green), blue)
    is_red = fn.cast(value == red, dtype=types.FLOAT)
    is_green = fn.cast(value == green, dtype=types.FLOAT) * (1.0 - is_red)
    is_blue = (1.0 - is_red) * (1.0 - is_green)
    divisor = math.max(reach, 0.5)
    hue = is_red * ((green - blue) / divisor)
    hue = hue + is_green * ((blue - red) / divisor + 2.0) + is_blue * ((red - green) / divisor + 4.0) + sixths
    planes = []
    for offset in (5.0, 3.0, 1.0):
        place = hue + offset
        place = place - math.floor(place / 6.0) * 6.0
        planes.append(value - reach * math.max(math.min(math.min(place, 4.0 - place), 1.0), 0.0))
    return _cut(fn.cat(*planes, axis=2) * _TO_BYTE)


def _blend(images: Any, shares: Any, stretches: bool) -> Any:
    """By (4,) shares: the image, its grey, its mean grey and, if it `stretches`, itself from darkest to brightest."""
    grey = fn.reductions.sum(images * types.Constant(_GREY), axes=(2,), keep_dims=True)
    # What is cut is cut from a number that is already rounded to fewer digits than torch's.
    grey = math.floor(grey + 1e-4)
    moved = images * shares[0] + grey * shares[1] + fn.reductions.mean(grey, axes=(0, 1), keep_dims=True) * shares[2]
    if stretches:
        lowest = fn.reductions.min(images, axes=(0, 1), keep_dims=True)
        reach = fn.cast(fn.reductions.max(images, axes=(0, 1), keep_dims=True) - lowest, dtype=types.FLOAT)
        # A channel of one value stays as it is.
        flat = 1.0 - math.min(reach, 1.0)
        stretched = (images - lowest * (1.0 - flat)) * (flat + (1.0 - flat) * 255.0 / math.max(reach, 1.0))
        moved = moved + stretched * shares[3]
    return _cut(moved)


def _only(codes: np.ndarray, *wanted: Operation) -> np.ndarray:
    return np.isin(codes, wanted)


def _warps(codes: np.ndarray, amounts: np.ndarray, size: int) -> np.ndarray:
    """(N, 2, 3) float32: from the places of the output, in pixels from the corner, to those of the input."""
    matrices = np.tile(np.eye(2, 3), (len(codes), 1, 1))
    amount = amounts[:, 0].astype(np.float64)
    shifts = np.trunc(amount)
    matrices[:, 0, 1] = np.where(codes == Operation.SHEAR_X, amount, 0.0)
    matrices[:, 1, 0] = np.where(codes == Operation.SHEAR_Y, amount, 0.0)
    matrices[:, 0, 2] = np.where(codes == Operation.TRANSLATE_X, -shifts, 0.0)
    matrices[:, 1, 2] = np.where(codes == Operation.TRANSLATE_Y, -shifts, 0.0)
    turned = codes == Operation.ROTATE
    angle = np.radians(amount[turned])
    cos, sin = np.cos(angle), np.sin(angle)
    centre = size / 2
    matrices[turned] = np.stack(
        [
            np.stack([cos, -sin, centre * (1 - cos + sin)], axis=1),
            np.stack([sin, cos, centre * (1 - cos - sin)], axis=1),
        ],
        axis=1,
    )
    return matrices.astype(np.float32)


def _shifts(codes: np.ndarray, amounts: np.ndarray, size: int) -> np.ndarray:
    """(N, 3) float32 that is added to R, G, B."""
    return np.where((codes == Operation.LIGHTING)[:, None], amounts[:, :3], 0.0).astype(np.float32)


def _shares(codes: np.ndarray, amounts: np.ndarray, size: int) -> np.ndarray:
    """(N, 4) float32: how much of the image, its grey, its mean grey and the stretched image."""
    kept = np.where(_only(codes, Operation.BRIGHTNESS, Operation.SATURATION, Operation.CONTRAST), amounts[:, 0], 1.0)
    stretched = codes == Operation.AUTO_CONTRAST
    grey = np.where(codes == Operation.SATURATION, 1.0 - kept, 0.0)
    mean = np.where(codes == Operation.CONTRAST, 1.0 - kept, 0.0)
    return np.stack([np.where(stretched, 0.0, kept), grey, mean, stretched], axis=1).astype(np.float32)


def _rests(codes: np.ndarray, amounts: np.ndarray, size: int) -> np.ndarray:
    """(N,) float32: the share of the blurred image."""
    return np.where(codes == Operation.SHARPNESS, 1.0 - amounts[:, 0], 0.0).astype(np.float32)


def _equalized(codes: np.ndarray, amounts: np.ndarray, size: int) -> np.ndarray:
    return (codes == Operation.EQUALIZE).astype(np.uint8)


def _masks(codes: np.ndarray, amounts: np.ndarray, size: int) -> np.ndarray:
    """(N,) uint8: the bits that stay."""
    bits = np.where(codes == Operation.POSTERIZE, amounts[:, 0], 8).astype(np.int64)
    return (0xFF00 >> bits & 0xFF).astype(np.uint8)


def _thresholds(codes: np.ndarray, amounts: np.ndarray, size: int) -> np.ndarray:
    """(N,) int16: values from there on are inverted."""
    levels = np.where(codes == Operation.SOLARIZE, np.ceil(amounts[:, 0]), 256)
    return np.where(codes == Operation.INVERT, 0, levels).astype(np.int16)


def _hues(codes: np.ndarray, amounts: np.ndarray, size: int) -> np.ndarray:
    """(N,) float32 sixths of the colour circle."""
    return np.where(codes == Operation.HUE, 6 * amounts[:, 0], 0.0).astype(np.float32)


def _erased(codes: np.ndarray, amounts: np.ndarray, size: int) -> np.ndarray:
    """(N, 4) float32 (y, x, height, width); nothing is erased where height and width are 0."""
    return np.where((codes == Operation.ERASE)[:, None], amounts, 0.0).astype(np.float32)
