"""Finds what is damaged in a data set: every byte of a prepared set, every file of another one."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pipelines import progress, shards
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.prepared_set import File, Split
from pipelines.soundness import UnsoundError, sound

_AT_ONCE = 1 << 22


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
    sizes = [0] * len(manifest)

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

    found = []
    what = f"checking {manifest.split}"
    with progress.bar(len(manifest), what, "images") as done, ThreadPoolExecutor(threads) as pool:
        for damage in pool.map(check, range(len(manifest))):
            done(1)
            if damage is not None:
                found.append(damage)
    return Findings(len(manifest), sum(sizes), tuple(found))


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
    if manifest is None or not path.exists():
        return found
    samples = manifest.members_of(number)
    if found:
        lost = [damage for sample in samples if (damage := _check_sample(manifest, sample)) is not None]
        if not lost:
            found.append(Damage(str(path), "its images are whole: only labels, boxes or the tar structure are damaged"))
        found += lost
    if decode:
        bad = {damage.where for damage in found}
        for sample in samples:
            if manifest.describe(sample) in bad:
                continue
            try:
                data = manifest.read(sample)
                assert isinstance(data, bytes)
                _check_image(data, int(manifest.heights[sample]), int(manifest.widths[sample]), decode)
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
        except (OSError, SyntaxError, ValueError) as error:
            raise UnsoundError(f"cannot be decoded: {error}") from None


def _hash(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_AT_ONCE):
            hashed.update(block)
    return hashed.hexdigest()
