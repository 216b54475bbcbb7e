"""Prepares a split: every image resized once, in shards with a manifest, so that training reads less and decodes less.

    DST/train-000000.tar ...   shards (`pipelines.shards`), and train-000000.idx, what DALI's own reader wants of each
    DST/train.arrow            the manifest
    DST/set.json               splits, shards, checksums (`pipelines.prepared_set`)
    DST/.prepare/train/        what is known of finished shards: work goes on from it, and a damaged set is mended by it

The same source and options make the same bytes, whatever the number of processes and however often it was interrupted.
A shard is whole or absent: written aside, synced, moved to its place, and only then recorded.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import cache, listing, manifest, pieces, preparation_state, prepared_set, progress
from pipelines.amounts import shown_bytes
from pipelines.errors import DataError, FullDiskError, LorotError
from pipelines.files import LocalFiles
from pipelines.manifest import Heading, Manifest, Rows
from pipelines.pieces import Piece
from pipelines.preparation_state import Place
from pipelines.prepared_set import File, Split
from pipelines.resizing import Recipe
from pipelines.shard_record import Record, ShardWriter, mend_index

SHARD_BYTES = 256 * 1000**2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Report:
    """What was made.

    Attributes:
        split: what `set.json` says of it now.
        name: the split's.
        made: shards made in this run; the others were there.
        prepared: samples prepared in this run.
        seconds: of this run.
    """

    name: str
    split: Split
    made: int
    prepared: int
    seconds: float

    @property
    def bytes_after(self) -> int:
        """Of all shards and the manifest."""
        return sum(shard.bytes for shard in self.split.shards) + self.split.manifest.bytes

    @property
    def images_per_s(self) -> float:
        """Images prepared per second of this run."""
        return self.prepared / self.seconds if self.seconds else 0.0


def prepare(
    source: Manifest,
    folder: Path,
    *,
    recipe: Recipe | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_bad_image: str = "error",
    workers: int = 0,
    restart: bool = False,
) -> Report:
    """Prepare a split into `folder`, or go on with it, or mend what is missing or truncated there.

    Args:
        recipe: what becomes of an image; by default the short side becomes 256 pixels.
        shard_bytes: most bytes of a shard (but for one sample that is larger).
        on_bad_image: "error", or "skip": leave unreadable images out, and list them.
        workers: processes; 0: one for each core.
        restart: remove what was prepared of this split from another source or with other options.

    Raises:
        LorotError: a bad option.
        DataError: an image cannot be read, the source knows of single objects, the folder holds something else or the
            source itself, or another process prepares there.
        FullDiskError: there is no room; finished shards stay, and the same call goes on after them.
    """
    began = time.monotonic()
    recipe = recipe or Recipe()
    if on_bad_image not in ("error", "skip"):
        raise LorotError(f"on_bad_image {on_bad_image!r} does not exist; there are error, skip")
    if shard_bytes < 1 or workers < 0:
        raise LorotError(f"shards of {shard_bytes} bytes, {workers} workers: write numbers above 0")
    if source.instances is not None:
        raise DataError(
            f"{source.root}: prepared shards have no room for what {source.name} says of single objects (classes, "
            "crowds, masks); use the data set as it is"
        )
    # `restart` does not lift this: the source would be gone before it is read.
    preparation_state.refuse_source(source, Path(folder))
    options = {**asdict(recipe), "shard_bytes": shard_bytes, "on_bad_image": on_bad_image}
    place = Place(Path(folder), source.split)
    run = _Run(source, place, recipe, shard_bytes, on_bad_image, workers or len(os.sched_getaffinity(0)))
    try:
        place.records.mkdir(parents=True, exist_ok=True)
        with place.held():
            preparation_state.agree(place, source, options, restart)
            made = run.fill()
            split = _complete(source, place, options, [record for _, record in sorted(run.records.items())])
            preparation_state.clear_beyond(place, len(run.records))
    except OSError as error:
        raise run.storage_error(error) from None
    return Report(source.split, split, made, run.prepared, time.monotonic() - began)


class _Run:
    """One preparation: which shards there are already, and the making of the others."""

    def __init__(
        self, source: Manifest, place: Place, recipe: Recipe, shard_bytes: int, on_bad_image: str, workers: int
    ) -> None:
        self.records: dict[int, Record] = {}
        self.prepared = 0
        self._source = source
        self._place = place
        self._recipe = recipe
        self._shard_bytes = shard_bytes
        self._on_bad_image = on_bad_image
        self._workers = workers
        self._finishing: tuple[int, Future[Record]] | None = None

    def fill(self) -> int:
        """Make all shards that are missing; how many that were."""
        total, place = len(self._source), self._place
        for left_behind in place.records.glob("*.partial"):
            left_behind.unlink()
        missing, number, at = [], 0, 0
        while at < total and (record := Record.load(place.record(number))) is not None and record.first == at:
            if place.size(number) == record.bytes and mend_index(place.shard(number), record):
                self.records[number] = record
            else:
                missing.append((number, at, record.stop))
            number, at = number + 1, record.stop
        kept = len(self.records)
        left = sum(stop - first for _, first, stop in missing) + total - at
        with progress.bar(left, f"preparing {self._source.split}", "images") as done, ThreadPoolExecutor(1) as syncing:
            for lost, first, stop in missing:
                self._write(lost, first, stop, None, syncing, done)
            if at < total:
                self._write(number, at, total, self._shard_bytes, syncing, done)
        return len(self.records) - kept

    def storage_error(self, error: OSError) -> DataError:
        """What to tell of a failed write."""
        folder = self._place.folder
        if error.errno not in _FULL:
            return DataError(
                f"{error.filename or folder}: cannot be written ({error.strerror}); allow it, or go elsewhere"
            )
        written = sum(record.bytes for record in self.records.values())
        finished = sum(record.stop - record.first for record in self.records.values())
        left = len(self._source) - finished
        more = (
            f"about {shown_bytes(written / finished * left)} more are" if finished else f"room for {left:,} images is"
        )
        limit = "no file may be so large here" if error.errno == errno.EFBIG else "the disk is full"
        return FullDiskError(
            f"{folder}: {limit} ({error.strerror}): {len(self.records)} shards ({shown_bytes(written)}) are finished, "
            f"{more} needed, and {shown_bytes(shutil.disk_usage(folder).free)} are free; make room and run the same "
            "command again: it goes on after the finished shards"
        )

    def _write(
        self,
        number: int,
        first: int,
        stop: int,
        limit: int | None,
        syncing: ThreadPoolExecutor,
        done: Callable[[int], None],
    ) -> None:
        """Write rows first to stop - 1 of the source into shards from `number` on, each of at most `limit` bytes."""
        writer = ShardWriter(self._place.partial(number), first)
        try:
            for piece in self._pieces(first, stop):
                content, start = memoryview(piece.content), 0
                for sample in piece.samples:
                    if sample.reason and self._on_bad_image == "error":
                        raise DataError(
                            f"{self._source.describe(sample.id)}: {sample.reason}; repair or remove it, or leave such "
                            "images out with --on-bad-image skip"
                        )
                    # What cannot be read needs no room: of those alone no shard is begun.
                    fits = limit is None or writer.empty or bool(sample.reason) or writer.size_with(sample) <= limit
                    if not fits:
                        self._finish(writer, number, sample.id, syncing)
                        number += 1
                        writer = ShardWriter(self._place.partial(number), sample.id)
                    writer.add(sample, content[start : start + sample.size])
                    start += sample.size
                self.prepared += len(piece.samples)
                done(len(piece.samples))
            if writer.empty:
                raise DataError(f"{self._source.root}: no image of split {self._source.split!r} can be read")
            self._finish(writer, number, stop, syncing)
            self._settle()
        finally:
            if not writer.finishing:
                writer.discard()
            # After an error the shard before it is still worth keeping.
            with contextlib.suppress(OSError):
                self._settle()

    def _pieces(self, first: int, stop: int) -> Iterator[Piece]:
        """What becomes of rows first to stop - 1; an OSError there is none of the folder that is written to."""
        try:
            yield from pieces.make_all(self._source, self._recipe, first, stop, self._workers)
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            raise DataError(
                f"{what}images cannot be prepared ({error.strerror or error}); what is finished stays, start again to "
                "go on"
            ) from error

    def _finish(self, writer: ShardWriter, number: int, stop: int, syncing: ThreadPoolExecutor) -> None:
        """End a shard. Waiting for the disk is left to a thread: the processes are to be fed meanwhile."""
        self._settle()
        writer.finishing = True
        path, record = self._place.shard(number), self._place.record(number)
        self._finishing = number, syncing.submit(writer.finish, stop, path, record)

    def _settle(self) -> None:
        if self._finishing is not None:
            (number, finishing), self._finishing = self._finishing, None
            self.records[number] = finishing.result()


def _complete(source: Manifest, place: Place, options: dict[str, Any], records: list[Record]) -> Split:
    """Write the manifest and the set's own file."""
    shards = tuple(File(place.shard(number).name, record.bytes, record.sha256) for number, record in enumerate(records))
    rows, digest = _rows(source, records)
    fingerprint = hashlib.sha256(" ".join(shard.sha256 for shard in shards).encode()).hexdigest()
    names = tuple(shard.path for shard in shards)
    heading = Heading("prepared", source.split, source.classes, source.class_ids, digest, fingerprint, shards=names)
    manifest.write(place.manifest, heading, rows)
    content = place.manifest.read_bytes()
    skipped = [(row, reason) for record in records for row, reason in record.skipped]
    split = Split(
        samples=len(rows.labels),
        source_bytes=int(sum(record.source_bytes.sum() for record in records)),
        image_bytes=int(sum(record.sizes.sum() for record in records)),
        digest=digest,
        source=preparation_state.describe_source(source),
        options=options,
        made_with=preparation_state.made_with(),
        classes=source.classes,
        class_ids=source.class_ids,
        skipped=tuple((source.source_path(row) or f"row {row}", reason) for row, reason in skipped),
        manifest=File(place.manifest.name, len(content), hashlib.sha256(content).hexdigest()),
        shards=shards,
    )
    with cache.locked(place.folder / ".prepare"):
        there = place.folder / prepared_set.NAME
        splits = prepared_set.read(LocalFiles(place.folder), str(place.folder)) if there.exists() else {}
        prepared_set.write(place.folder, {**splits, place.split: split})
    return split


def _rows(source: Manifest, records: list[Record]) -> tuple[Rows, str]:
    """The manifest's columns, and the digest of what the set holds: the same however it is cut into shards."""

    def column(name: str) -> np.ndarray:
        joined: np.ndarray = np.concatenate([getattr(record, name) for record in records])
        return joined

    ids = column("ids")
    with_boxes, with_masks = source.has_boxes, source.has_masks
    rows = Rows(
        labels=source.labels[ids],
        heights=column("heights"),
        widths=column("widths"),
        paths=[source.source_path(int(row)) or "" for row in ids] if source.encoded else None,
        box_counts=column("box_counts") if with_boxes else None,
        boxes=column("boxes") if with_boxes else None,
        shards=np.repeat(np.arange(len(records)), [len(record.ids) for record in records]),
        offsets=column("offsets"),
        sizes=column("sizes"),
        mask_offsets=column("mask_offsets") if with_masks else None,
        mask_sizes=column("mask_sizes") if with_masks else None,
        checksums=column("checksums"),
    )
    boxes = [rows.box_counts, rows.boxes] if with_boxes else []
    content = [rows.labels, rows.heights, rows.widths, rows.sizes, rows.checksums, *boxes]
    return rows, listing.digest(["prepared", *source.class_ids, *content])
