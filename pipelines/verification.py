"""Finds what is damaged in a data set: every byte of a prepared set, every file of another one."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines import progress, shards
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.prepared_set import File, Split
from pipelines.soundness import UnsoundError, sound

_AT_ONCE = 1 << 22
# Handing over single files would cost more than looking at them, and memory for each.
_SAMPLES_AT_ONCE = 256


class Damage(NamedTuple):
    """Where, and what is wrong there."""

    where: str
    what: str


@dataclass(frozen=True)
class Findings:
    """What was looked at, and what is damaged, in order.

    Attributes:
        samples, bytes: that were looked at.
    """

    samples: int
    bytes: int
    damage: tuple[Damage, ...]


def verify_prepared(root: Path, split: str, about: Split, *, decode: bool = False, threads: int = 1) -> Findings:
    """Compare all bytes of a prepared split with its checksums; samples are named where a shard is damaged.

    Args:
        about: what `set.json` says of the split.
        decode: decode every image as well.
    """
    found = _check_whole(root / about.manifest.path, about.manifest)
    opened: Manifest | None = None
    try:
        opened = Manifest.open(root / about.manifest.path, root)
    except DataError as error:
        found = found or [Damage(str(root / about.manifest.path), str(error))]
    with (
        progress.bar(sum(shard.bytes for shard in about.shards), f"checking {split}", "bytes") as done,
        ThreadPoolExecutor(threads) as pool,
    ):
        checks = pool.map(lambda at: _check_shard(root, about.shards[at], at, opened, decode), range(len(about.shards)))
        for shard, damage in zip(about.shards, checks, strict=True):
            done(shard.bytes)
            found += damage
    return Findings(about.samples, sum(shard.bytes for shard in about.shards), tuple(found))


def verify_files(manifest: Manifest, *, decode: bool = False, threads: int = 1) -> Findings:
    """Look whether every sample is a whole image of the size that the manifest has.

    Args:
        decode: decode every image as well: damage amid its data is seen only so, and not always.
    """
    total = len(manifest)
    sizes = np.zeros(total, np.int64)

    def check(sample: int) -> Damage | None:
        try:
            data = manifest.read(sample)
            sizes[sample] = len(data) if isinstance(data, bytes) else data.nbytes
            if isinstance(data, bytes):
                _check_image(data, int(manifest.heights[sample]), int(manifest.widths[sample]), decode)
            if manifest.has_masks:
                manifest.mask(sample)
        except (DataError, UnsoundError) as error:
            return Damage(manifest.describe(sample), str(error))
        return None

    def check_some(start: int) -> list[Damage | None]:
        stop = min(start + _SAMPLES_AT_ONCE, total)
        checked = [check(sample) for sample in range(start, stop)]
        done(stop - start)
        return checked

    what, starts = f"checking {manifest.split}", range(0, total, _SAMPLES_AT_ONCE)
    with progress.bar(total, what, "images") as done, ThreadPoolExecutor(threads) as pool:
        found = [damage for some in pool.map(check_some, starts) for damage in some if damage is not None]
    return Findings(total, int(sizes.sum()), tuple(found))


def _check_whole(path: Path, file: File) -> list[Damage]:
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return [Damage(str(path), f"{size:,} bytes and not {file.bytes:,}")]
        if _hash(path) != file.sha256:
            return [Damage(str(path), "its checksum is not the one it was written with")]
    except OSError as error:
        return [Damage(str(path), f"cannot be read ({error.strerror})")]
    return []


def _check_shard(root: Path, shard: File, number: int, manifest: Manifest | None, decode: bool) -> list[Damage]:
    path = root / shard.path
    found = _check_whole(path, shard)
    if not found:
        found = _check_index(path)
    elif path.exists() and manifest is not None:
        found += _check_samples(path, manifest, number)
    if decode and path.exists() and manifest is not None:
        found += _check_decoding(manifest, number, {damage.where for damage in found})
    return found


def _check_index(shard: Path) -> list[Damage]:
    """Compare the index beside a whole shard with the shard."""
    path = shard.with_suffix(".idx")
    try:
        index = path.read_bytes()
        with shard.open("rb") as stream:
            if index == shards.index_of(stream).encode():
                return []
    except OSError as error:
        return [Damage(str(path), f"cannot be read ({error.strerror})")]
    except ValueError as error:
        return [Damage(str(shard), str(error))]
    return [Damage(str(path), "not the index of its shard")]


def _check_samples(path: Path, manifest: Manifest, number: int) -> list[Damage]:
    """Which samples of a damaged shard are damaged."""
    lost = [found for sample in manifest.members_of(number) if (found := _check_sample(manifest, sample)) is not None]
    return lost or [Damage(str(path), "its images are whole: only labels, boxes or the tar structure are damaged")]


def _check_decoding(manifest: Manifest, number: int, bad: set[str]) -> list[Damage]:
    """Which samples of a shard cannot be decoded, but for those that are known to be `bad`."""
    found = []
    for sample in manifest.members_of(number):
        if manifest.describe(sample) in bad:
            continue
        try:
            data = manifest.read(sample)
            assert isinstance(data, bytes)
            _check_image(data, int(manifest.heights[sample]), int(manifest.widths[sample]), True)
        except (UnsoundError, DataError) as error:
            found.append(Damage(manifest.describe(sample), str(error)))
    return found


def _check_sample(manifest: Manifest, sample: int) -> Damage | None:
    assert manifest.checksums is not None
    try:
        image = manifest.read(sample)
        place = manifest.mask_location(sample)
        mask = manifest.files.read(*place) if place is not None else b""
    except DataError:
        return Damage(manifest.describe(sample), "lies beyond the end of its shard")
    assert isinstance(image, bytes)
    if shards.checksum(image, mask) == int(manifest.checksums[sample]):
        return None
    return Damage(manifest.describe(sample), "its checksum is not the one it was written with")


def _check_image(data: bytes, height: int, width: int, decode: bool) -> None:
    readable = sound(data, height, width)
    if decode:
        try:
            with Image.open(io.BytesIO(readable)) as image:
                image.load()
        except Exception as error:  # What Pillow can raise on damaged files is not written anywhere.
            raise UnsoundError(f"cannot be decoded: {str(error) or type(error).__name__}") from None


def _hash(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_AT_ONCE):
            hashed.update(block)
    return hashed.hexdigest()
