"""What is known of a finished shard: enough to go on after it, to make it again alone, and to write the manifest."""

import contextlib
import json
import os
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines import cache, shards
from pipelines.pieces import Sample, key
from pipelines.shards import Place, Tar


@dataclass(frozen=True)
class Record:
    """A shard of n samples.

    Attributes:
        first, stop: the rows of the source it was made of.
        bytes, sha256: of the tar file.
        index_sha256: of the index beside it.
        skipped: (row of the source, reason) of those that could not be read.
        ids: (n,) int64 rows of the source.
        heights, widths, offsets, sizes, mask_offsets, mask_sizes, checksums: (n,) as in `manifest.Rows`.
        source_bytes: (n,) int64 of the images they were made from.
        box_counts, boxes: (n,) int64 and (sum of counts, 4) float32.
    """

    first: int
    stop: int
    bytes: int
    sha256: str
    index_sha256: str
    skipped: tuple[tuple[int, str], ...]
    ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    mask_offsets: np.ndarray
    mask_sizes: np.ndarray
    checksums: np.ndarray
    source_bytes: np.ndarray
    box_counts: np.ndarray
    boxes: np.ndarray

    def save(self, path: Path) -> None:
        """Write it; the file is whole or absent."""
        columns = {name: value for name, value in self._values() if isinstance(value, np.ndarray)}
        about = {name: value for name, value in self._values() if not isinstance(value, np.ndarray)}
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        with cache.replacing(path) as partial, partial.open("wb") as stream:
            np.savez(stream, about=text, allow_pickle=False, **columns)

    @classmethod
    def load(cls, path: Path) -> "Record | None":
        """The record in a file, or None if there is none that can be used."""
        try:
            with np.load(path, allow_pickle=False) as columns:
                values = dict(columns)
            about = json.loads(values.pop("about").tobytes())
            about["skipped"] = tuple((int(row), str(reason)) for row, reason in about["skipped"])
            return cls(**about, **values)
        except Exception:  # What a damaged zip file can raise is not written anywhere; it is made again.
            return None

    def _values(self) -> list[tuple[str, object]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def mend_index(shard: Path, record: Record) -> bool:
    """Write the index of a shard again if it is missing or damaged; false if the shard itself is not what it was."""
    with contextlib.suppress(FileNotFoundError):
        if sha256(shard.with_suffix(".idx").read_bytes()).hexdigest() == record.index_sha256:
            return True
    try:
        with shard.open("rb") as stream:
            index = shards.index_of(stream)
    except ValueError:
        return False
    if sha256(index.encode()).hexdigest() != record.index_sha256:
        return False
    write_index(shard, index)
    return True


def write_index(shard: Path, index: str) -> None:
    """Put the index beside its shard. It is not synced: what a power cut does to it, the next preparation mends."""
    with cache.replacing(shard.with_suffix(".idx"), durable=False) as partial:
        partial.write_text(index, encoding="utf-8")


class ShardWriter:
    """A shard in the making, in a file aside.

    Attributes:
        finishing: handed over to whoever waits for the disk; nobody else touches it any more.
    """

    def __init__(self, partial: Path, first: int) -> None:
        self._partial = partial
        self._first = first
        self._stream: BinaryIO = partial.open("wb")
        self._tar = Tar(self._stream)
        self.finishing = False
        self._samples: list[tuple[int, Sample]] = []
        self._skipped: list[tuple[int, str]] = []

    @property
    def empty(self) -> bool:
        """Whether it holds no sample yet."""
        return not self._samples

    def size_with(self, sample: Sample) -> int:
        """Bytes of the file if it ended after that sample."""
        size = self._tar.size + sample.size
        return size + shards.ending_size(size)

    def add(self, sample: Sample, content: memoryview) -> None:
        """Append a sample, or take note of one that could not be read."""
        if sample.reason:
            self._skipped.append((sample.id, sample.reason))
        else:
            self._samples.append((self._tar.size, sample))
            self._tar.append(content)

    def finish(self, stop: int, path: Path, record_path: Path) -> Record:
        """Move the shard to its place, with index and record; rows of the source up to `stop` - 1 are in it."""
        try:
            index = shards.index((key(sample.id), _shift(sample, at)) for at, sample in self._samples)
            record = self._record(stop, self._tar.close(), index)
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            write_index(path, index)
            self._partial.replace(path)
            record.save(record_path)
        except OSError:
            self.discard()
            raise
        return record

    def discard(self) -> None:
        """Remove what was written; nothing happens to a finished shard."""
        # What could not be written cannot be flushed either.
        with contextlib.suppress(OSError):
            self._stream.close()
        self._partial.unlink(missing_ok=True)

    def _record(self, stop: int, digest: str, index: str) -> Record:
        rows = []
        for at, sample in self._samples:
            image = next(place for ending, place in sample.places.items() if ending in ("jpg", "png"))
            mask = sample.places.get("mask.png", Place(-at, 0))
            sizes = (image.offset + at, image.size, mask.offset + at, mask.size)
            rows.append((sample.id, sample.height, sample.width, *sizes, sample.source_bytes, len(sample.boxes)))
        table = np.array(rows, np.int64).reshape(len(rows), 9)
        names = (
            "ids",
            "heights",
            "widths",
            "offsets",
            "sizes",
            "mask_offsets",
            "mask_sizes",
            "source_bytes",
            "box_counts",
        )
        return Record(
            first=self._first,
            stop=stop,
            bytes=self._tar.size,
            sha256=digest,
            index_sha256=sha256(index.encode()).hexdigest(),
            skipped=tuple(self._skipped),
            checksums=np.array([sample.checksum for _, sample in self._samples], np.uint64),
            boxes=np.array([box for _, sample in self._samples for box in sample.boxes], np.float32).reshape(-1, 4),
            **{name: table[:, column].copy() for column, name in enumerate(names)},
        )


def _shift(sample: Sample, by: int) -> dict[str, Place]:
    return {ending: Place(place.offset + by, place.size) for ending, place in sample.places.items()}
