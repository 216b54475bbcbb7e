"""Masks as run lengths, the way COCO's files and tools have them; the only module but the scorer that knows the format.

A mask is read column by column; its runs alternate, beginning with zeros. In compressed form each run is written in
groups of 5 bits, from the fourth run on as the difference to the one before the last (COCO API, `maskApi.c`).

The compiled functions trust their input: a string that ends too early makes them read on behind it. So `checked` comes
before them wherever a string comes from a file.
"""

from collections.abc import Sequence

import faster_coco_eval.core.mask as compiled
import numpy as np

# Groups of 5 bits that the longest sensible run takes.
_MOST_GROUPS = 7
# Pixels of outlines that are drawn in any image, however small, and in none, however large; each takes 60 bytes or more
# for a moment.
_LONGEST = 10**6, 2 * 10**7


def encode(masks: np.ndarray) -> list[bytes]:
    """Compressed run lengths of (K, H, W) masks, true or not 0 on the object."""
    if not len(masks):
        return []
    planes = np.asfortranarray((masks != 0).astype(np.uint8).transpose(1, 2, 0))
    return [_bytes(found) for found in compiled.encode(planes)]


def decode(segmentations: Sequence[bytes], height: int, width: int) -> np.ndarray:
    """(K, height, width) uint8 masks, 0 or 1, from compressed run lengths of that size."""
    if not segmentations:
        return np.zeros((0, height, width), np.uint8)
    found = compiled.decode([{"size": [height, width], "counts": runs} for runs in segmentations])
    return np.ascontiguousarray(found.transpose(2, 0, 1))


def sampled(segmentations: Sequence[bytes], source: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Masks of one size brought to another, each pixel that of the source at its centre.

    One mask after the other is decoded, so that no more than one of them is ever there at the source's size.

    Args:
        segmentations: K compressed run lengths over `source`.
        source, size: (height, width).

    Returns:
        (K, *size) uint8, 0 or 1.
    """
    # Whole numbers: where a centre falls just between two pixels of the source, the one on the right or below is taken.
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, source, strict=True))
    masks = np.empty((len(segmentations), *size), np.uint8)
    for mask, runs in zip(masks, segmentations, strict=True):
        plane = compiled.decode([{"size": list(source), "counts": runs}])[:, :, 0]
        mask[:] = plane if list(source) == list(size) else plane[:, columns][rows]
    return masks


def from_counts(counts: Sequence[int], height: int, width: int) -> bytes:
    """Compressed run lengths from plain ones; raises ValueError unless they fill height x width pixels."""
    if any(isinstance(run, bool) or not isinstance(run, int) or run < 0 for run in counts):
        raise ValueError("its run lengths are not all whole numbers from 0 on")
    if sum(counts) != height * width:
        raise ValueError(f"its run lengths add up to {sum(counts)}, not to {width} x {height} pixels")
    return _bytes(compiled.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width))


def from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> bytes:
    """Compressed run lengths of the union of polygons (x0, y0, x1, y1, ...), as COCO's own tools fill them.

    Those of less than three corners, as COCO has some, enclose nothing and are left out; b"" if none is left.

    Raises:
        ValueError: an odd number of coordinates, one that is not finite, or outlines of more than 4 * height * width
            pixels (but 1e6 are always allowed, and 2e7 never exceeded: drawing them would take all memory).
    """
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]
    length = 0.0
    for polygon in polygons:
        if len(polygon) % 2:
            raise ValueError(f"a polygon of {len(polygon)} numbers; they come in pairs")
        try:
            corners = np.array(polygon, np.float64).reshape(-1, 2)
        except OverflowError:
            raise ValueError("a polygon has a corner beyond all numbers") from None
        length += float(np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1).sum())
    most = min(max(_LONGEST[0], 4 * height * width), _LONGEST[1])
    # What is no number is not below either.
    if not length <= most:
        raise ValueError(
            f"polygons whose outlines are {length:.0f} pixels long, of which at most {most} are drawn for an image of "
            f"{width} x {height} pixels"
        )
    if not polygons:
        return b""
    drawn = compiled.frPyObjects([list(map(float, polygon)) for polygon in polygons], height, width)
    return _bytes(drawn[0] if len(drawn) == 1 else compiled.merge(drawn))


def checked(runs: bytes, height: int, width: int) -> bytes:
    """The same compressed run lengths; raises ValueError unless they fill height x width pixels exactly."""
    counts = _counts(runs)
    if counts.min(initial=0) < 0 or int(counts.sum()) != height * width:
        raise ValueError(f"its run lengths do not add up to {width} x {height} pixels")
    return runs


def areas(segmentations: Sequence[bytes]) -> np.ndarray:
    """(K,) int64 pixels of each mask."""
    return np.array([int(_counts(runs)[1::2].sum()) for runs in segmentations], np.int64)


def _counts(runs: bytes) -> np.ndarray:
    """(R,) int64 plain run lengths of compressed ones; raises ValueError if these are not whole."""
    groups = np.frombuffer(runs, np.uint8).astype(np.int64) - 48
    if not len(groups) or groups.min() < 0 or groups.max() > 63:
        raise ValueError("its compressed run lengths hold what does not belong there")
    goes_on = groups & 32 != 0
    if goes_on[-1]:
        raise ValueError("its compressed run lengths end too early")
    ends = np.flatnonzero(~goes_on)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > _MOST_GROUPS:
        raise ValueError("its compressed run lengths hold a number too large")
    shifts = 5 * (np.arange(len(groups)) - np.repeat(starts, sizes))
    values = np.add.reduceat((groups & 31) << shifts, starts)
    # The highest bit of the last group is the sign.
    values -= np.where(groups[ends] & 16 != 0, 1 << (5 * sizes), 0)
    # Differences to the one before the last are undone by sums over every other one; the first three stand as they are.
    counts = values.copy()
    counts[1::2] = np.cumsum(values[1::2])
    counts[2::2] = np.cumsum(values[2::2])
    return counts


def _bytes(found: dict[str, object]) -> bytes:
    runs = found["counts"]
    return runs.encode() if isinstance(runs, str) else bytes(runs)  # type: ignore[call-overload]
