"""The index of a data set: where each sample lies, its label, height, width, boxes and mask.

An Arrow IPC file of one record batch, memory-mapped: opening costs the same for a thousand samples as for a hundred
million, all processes of a machine share its pages, and the numeric columns are numpy views of the file.

A sample is an encoded file below `root`, or a piece of a shard (a tar file) there (`Manifest.encoded` is true of both);
or it is a row of a `.npy` array of pixels beside the manifest, mapped too. The root may be a URL: what lies below it is
read through `pipelines.files`; the manifest itself is a local file.
An image whose header could not be read stays in the manifest with height and width 0: the loader's `on_bad_image`
decides what becomes of it when its turn comes (it must not plan a window for it).
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import cache, instance_columns, masks, prepared_set
from pipelines.columns import view
from pipelines.errors import DataError, UnreachableError
from pipelines.files import Files, open_files
from pipelines.instance_columns import InstanceRows, InstanceTable

FORMAT = 2
_KEY = b"lorot.manifest"
# Columns that say where in a shard a sample lies.
_PLACES = ("shard", "offset", "size", "mask_offset", "mask_size")


@dataclass(frozen=True)
class Rows:
    """What a manifest holds, as columns over N samples; paths are relative to the root, with forward slashes.

    Attributes:
        labels, heights, widths: (N,) int64; sizes in pixels of the image as shown (EXIF orientation applied), 0 if the
            header is unreadable.
        paths: N encoded files; with shards, what the samples were made from; none if an array holds the pixels
            (`Heading.array`).
        box_counts: (N,) int64 boxes of each sample, or none.
        boxes: (sum of counts, 4) float32 (x_min, y_min, x_max, y_max), half-open, source pixels.
        mask_paths: N image files whose non-zero pixels are the object, or none; "" for a sample without.
        shards, offsets, sizes: (N,) int32 indices into `Heading.shards`, (N,) int64 first byte in it, and (N,) int64
            bytes of each encoded sample; or none of the three.
        mask_offsets, mask_sizes: (N,) int64, the same for the mask's file in the same shard; size 0 without one.
        checksums: (N,) uint64 `shards.checksum` of each sample's bytes and its mask's, or none.
        instances: more about the object in each box, or none.
    """

    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    paths: list[str] | None = None
    box_counts: np.ndarray | None = None
    boxes: np.ndarray | None = None
    mask_paths: list[str] | None = None
    shards: np.ndarray | None = None
    offsets: np.ndarray | None = None
    sizes: np.ndarray | None = None
    mask_offsets: np.ndarray | None = None
    mask_sizes: np.ndarray | None = None
    checksums: np.ndarray | None = None
    instances: InstanceRows | None = None


@dataclass(frozen=True)
class Heading:
    """What a manifest says of the whole split.

    Attributes:
        name, split: as given to `datasets.load`.
        classes: readable, distinct class names, by label.
        class_ids: the names the files use (folders, synsets), by label.
        digest: sha256 hex of the content listing; the same wherever the root lies.
        fingerprint: changes whenever a file it was made from does (path, size, modification time) or an option.
        array: name of the `.npy` file beside the manifest that holds the pixels, (N, H, W) or (N, H, W, 3) uint8.
        mask_threshold: the mask of a row of the array is where any channel is above this; no masks if none.
        shards: paths of the shards, relative to the root; empty if samples are files or rows of the array.
        num_trainable: samples of use for training, which come first; None: all are.
        remarks: what was mended or left out when the annotations were read, and how often.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    class_ids: tuple[str, ...]
    digest: str
    fingerprint: str
    array: str | None = None
    mask_threshold: int | None = None
    shards: tuple[str, ...] = ()
    num_trainable: int | None = None
    remarks: dict[str, int] = field(default_factory=dict)


class Manifest:
    """An open manifest. Pickles as its path, so that another process maps the same pages.

    Attributes:
        path: the manifest's own file; `Manifest.open(path, root)` opens it again without looking at the data.
        root: the folder that the samples lie in, or its URL.
        files: what reads below the root.
        labels, heights, widths: (N,) int64 views of the file.
        encoded: whether `read` yields encoded files or pixels.
        sizes, checksums: (N,) int64 and uint64 views of the file, as in `Rows`, or None.
        instances: the single objects of the samples, or None if the data set knows of none.
    """

    def __init__(self, path: Path, root: Path | str, heading: Heading, batch: pa.RecordBatch) -> None:
        self.path = path
        self.root = root
        self.files: Files = open_files(root, prepared_set.read_known(path) if "://" in str(root) else None)
        self.heading = heading
        self.labels: np.ndarray = view(batch.column("label"))
        self.heights: np.ndarray = view(batch.column("height"))
        self.widths: np.ndarray = view(batch.column("width"))
        self.encoded = heading.array is None
        names = batch.schema.names
        self._paths = batch.column("path") if "path" in names else None
        self._mask_paths = batch.column("mask_path") if "mask_path" in names else None
        self._shards, self._offsets, self.sizes, self._mask_offsets, self._mask_sizes = (
            view(batch.column(name)) if name in names else None for name in _PLACES
        )
        self.checksums: np.ndarray | None = view(batch.column("checksum")) if "checksum" in names else None
        self._box_offsets: np.ndarray | None = None
        self._boxes = np.zeros((0, 4), np.float32)
        if "boxes" in names:
            column = batch.column("boxes")
            self._box_offsets = view(column.offsets)
            self._boxes = view(column.values.flatten()).reshape(-1, 4)
        self.instances: InstanceTable | None = instance_columns.open_table(batch, self._box_offsets, self._boxes)
        self._pixels = None if heading.array is None else _map_array(path.parent / heading.array, len(self.labels))

    @classmethod
    def open(cls, path: Path | str, root: Path | str) -> "Manifest":
        """Map a manifest that `write` made; raises DataError if the file is missing, damaged or of another format."""
        path = Path(path)
        heading, batch = read_file(path)
        return cls(path, root if "://" in str(root) else Path(root), heading, batch)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"<Manifest {self.name} {self.split}: {len(self)} samples, {len(self.classes)} classes, {self.root}>"

    def __reduce__(self) -> tuple[Callable[..., "Manifest"], tuple[Path, Path | str]]:
        return Manifest.open, (self.path, self.root)

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.heading.name

    @property
    def split(self) -> str:
        """The split's name."""
        return self.heading.split

    @property
    def classes(self) -> tuple[str, ...]:
        """Readable, distinct class names, by label."""
        return self.heading.classes

    @property
    def class_ids(self) -> tuple[str, ...]:
        """Class names as the files have them (folders, synsets), by label."""
        return self.heading.class_ids

    @property
    def digest(self) -> str:
        """sha256 hex of the content listing, independent of where the root lies."""
        return self.heading.digest

    @property
    def has_boxes(self) -> bool:
        """Whether the data set has boxes; single samples may still have none."""
        return self._box_offsets is not None

    @property
    def has_masks(self) -> bool:
        """Whether the data set has masks; single samples may still have none."""
        return self._mask_paths is not None or self._mask_sizes is not None or self.heading.mask_threshold is not None

    def read(self, sample: int) -> bytes | np.ndarray:
        """The sample's encoded bytes; or, if not `encoded`, its pixels, (H, W, 3) uint8.

        Raises:
            UnreachableError: the shard it lies in is gone or cut short, though it was whole when the set was opened.
            DataError: the file is gone or unreadable, or its path leaves the root.
        """
        if self.encoded:
            path, offset, size = self.location(sample)
            try:
                return self.files.read(path, offset, size)
            except UnreachableError:
                raise
            except DataError as error:
                if size is None:
                    raise
                # Many samples are lost with it: left out one by one, they would silently make a smaller data set.
                raise UnreachableError(
                    f"{error}; a lost shard is no bad image, and no sample is left out for it"
                ) from None
        assert self._pixels is not None
        pixels = self._pixels[int(sample)]
        return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else np.array(pixels)

    def location(self, sample: int) -> tuple[str, int, int | None]:
        """Where an encoded sample's bytes lie: path below the root, first byte, number of bytes (None: the whole file).

        Raises:
            ValueError: the samples are rows of an array.
        """
        sample = int(sample)
        if self._shards is not None and self._offsets is not None and self.sizes is not None:
            shard = self.heading.shards[int(self._shards[sample])]
            return shard, int(self._offsets[sample]), int(self.sizes[sample])
        if self._paths is None:
            raise ValueError(f"{self.name}: its samples lie in the array {self.heading.array}, not in files")
        return self._paths[sample].as_py(), 0, None

    def members_of(self, shard: int) -> range:
        """The samples that lie in a shard (its index in `heading.shards`); samples are in the order of the shards."""
        assert self._shards is not None
        start, stop = np.searchsorted(self._shards, [shard, shard + 1])
        return range(int(start), int(stop))

    def source_path(self, sample: int) -> str | None:
        """The path of the sample's file, or of the one it was made from; None for the rows of an array."""
        return None if self._paths is None else self._paths[int(sample)].as_py()

    def describe(self, sample: int) -> str:
        """Where the sample lies, for messages: its path, or its place in the shard or the array."""
        sample = int(sample)
        if not self.encoded:
            return f"{self.name} {self.split}, row {sample} of {self.path.parent / str(self.heading.array)}"
        path, offset, size = self.location(sample)
        if size is None:
            return self._below_root(path)
        made_from = self.source_path(sample)
        return f"{self._below_root(path)}, byte {offset}" + (f" (made from {made_from})" if made_from else "")

    def boxes(self, sample: int) -> np.ndarray:
        """(M, 4) float32 boxes (x_min, y_min, x_max, y_max), half-open, in source pixels; (0, 4) without any."""
        if self._box_offsets is None:
            return np.zeros((0, 4), np.float32)
        start, stop = self._box_offsets[int(sample)], self._box_offsets[int(sample) + 1]
        return self._boxes[start:stop]

    def mask(self, sample: int) -> np.ndarray | None:
        """(H, W) bool, true on the object, or None without a mask; raises DataError for an unreadable one."""
        sample = int(sample)
        if self._pixels is not None and self.heading.mask_threshold is not None:
            above = self._pixels[sample] > self.heading.mask_threshold
            return above if above.ndim == 2 else above.any(axis=2)
        place = self.mask_location(sample)
        if place is None:
            return None
        try:
            return masks.decode(self.files.read(*place))
        except DataError:
            raise
        except ValueError as error:
            where = f"{self._below_root(place[0])}, byte {place[1]}" if place[1] else self._below_root(place[0])
            raise DataError(f"{where}: not a readable mask ({error}); restore or remove it") from None

    def mask_location(self, sample: int) -> tuple[str, int, int | None] | None:
        """As `location`, of the mask's file; None for a sample without."""
        if self._shards is not None and self._mask_offsets is not None and self._mask_sizes is not None:
            size = int(self._mask_sizes[sample])
            shard = self.heading.shards[int(self._shards[sample])]
            return (shard, int(self._mask_offsets[sample]), size) if size else None
        name = self._mask_paths[sample].as_py() if self._mask_paths is not None else ""
        return (name, 0, None) if name else None

    def _below_root(self, path: str) -> str:
        return f"{str(self.root).rstrip('/')}/{path}"


def write(path: Path, heading: Heading, rows: Rows) -> None:
    """Write a manifest; the file is whole or absent.

    Raises:
        ValueError: the columns disagree in length, or a label has no class.
    """
    count = len(rows.labels)
    if count and not 0 <= int(rows.labels.min()) <= int(rows.labels.max()) < len(heading.classes):
        raise ValueError(f"labels {rows.labels.min()} to {rows.labels.max()} for {len(heading.classes)} classes")
    columns: dict[str, pa.Array] = {
        "label": pa.array(np.asarray(rows.labels, np.int64)),
        "height": pa.array(np.asarray(rows.heights, np.int64)),
        "width": pa.array(np.asarray(rows.widths, np.int64)),
    }
    if rows.paths is not None:
        columns["path"] = pa.array(rows.paths, pa.large_string())
    if rows.mask_paths is not None:
        columns["mask_path"] = pa.array(rows.mask_paths, pa.large_string())
    if rows.shards is not None and not set(np.unique(rows.shards)) <= set(range(len(heading.shards))):
        raise ValueError(f"shards {rows.shards.min()} to {rows.shards.max()} of {len(heading.shards)}")
    places = (rows.shards, rows.offsets, rows.sizes, rows.mask_offsets, rows.mask_sizes)
    for name, values in zip(_PLACES, places, strict=True):
        if values is not None:
            columns[name] = pa.array(np.asarray(values, np.int32 if name == "shard" else np.int64))
    if rows.checksums is not None:
        columns["checksum"] = pa.array(np.asarray(rows.checksums, np.uint64))
    if rows.boxes is not None and rows.box_counts is not None:
        offsets = np.concatenate([[0], np.cumsum(rows.box_counts)]).astype(np.int64)
        corners = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(rows.boxes, np.float32).reshape(-1)), 4)
        columns["boxes"] = pa.LargeListArray.from_arrays(pa.array(offsets), corners)
        columns |= instance_columns.columns(rows.instances, offsets) if rows.instances else {}
    sources = (heading.array is not None, rows.shards is not None or rows.paths is not None)
    whole = all((values is None) == (rows.shards is None) for values in (rows.offsets, rows.sizes))
    if sum(sources) != 1 or not whole or any(len(column) != count for column in columns.values()):
        raise ValueError("a manifest needs files, shards or an array, and columns of one length")
    batch = pa.RecordBatch.from_pydict(columns)
    about = {"format": FORMAT, **asdict(heading)}
    batch = batch.replace_schema_metadata({_KEY: json.dumps(about).encode()})
    with cache.replacing(path) as partial, pa.ipc.new_file(str(partial), batch.schema) as writer:
        writer.write_batch(batch)


def cached(
    root: Path, name: str, split: str, key: str, fingerprint: str, build: Callable[[Path], tuple[Heading, Rows]]
) -> Manifest:
    """The manifest kept for `split` if its fingerprint still holds, else the one that `build(cache folder)` makes.

    Args:
        key: tells apart manifests of one split made with different options.
        fingerprint: of the files as they are now; `build` must put it into its heading.
    """
    kept = cache.folder(root)
    options = hashlib.sha256(key.encode()).hexdigest()[:8]
    path = kept / f"{re.sub(r'[^A-Za-z0-9._-]', '_', f'{name}-{split}')}-{options}.arrow"
    # Beside the data first, also where they cannot be written: what has a new cache folder each time reads it there.
    places = dict.fromkeys((cache.beside(root) / path.name, path))
    manifest = next((one for place in places if (one := _current(place, root, fingerprint)) is not None), None)
    if manifest is None:
        with cache.locked(kept):
            # Another process may have built it while this one waited.
            manifest = _current(path, root, fingerprint)
            if manifest is None:
                heading, rows = build(kept)
                write(path, heading, rows)
                manifest = Manifest.open(path, root)
    return manifest


def _current(path: Path, root: Path, fingerprint: str) -> Manifest | None:
    try:
        manifest = Manifest.open(path, root)
    except DataError:
        return None
    return manifest if manifest.heading.fingerprint == fingerprint else None


def read_file(path: Path, mend: str | None = None) -> tuple[Heading, pa.RecordBatch]:
    """What a manifest's file holds, mapped; raises DataError as `Manifest.open`.

    Args:
        mend: what helps against damage, if it is not seen from where the file lies.
    """
    if mend is None:
        prepared = (path.parent / prepared_set.NAME).exists()
        mend = (
            f"copy it here again, or {prepared_set.MEND}"
            if prepared
            else "delete it and start again: it is made, or fetched, anew"
        )
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        about: dict[str, Any] = json.loads((reader.schema.metadata or {})[_KEY])
        if about.pop("format") != FORMAT or reader.num_record_batches != 1:
            raise DataError(f"{path}: a manifest of another version of this program; {mend}")
        about |= {name: tuple(about[name]) for name in ("classes", "class_ids", "shards")}
        return Heading(**about), reader.get_batch(0)
    except FileNotFoundError:
        raise DataError(f"{path}: no such manifest; {mend.replace('delete it and ', '')}") from None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: a damaged manifest ({error}); {mend}") from None


def _map_array(path: Path, count: int) -> np.ndarray:
    try:
        pixels: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged or missing pixels ({error}); delete it, and it is made again") from None
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or len(pixels) != count:
        raise DataError(
            f"{path}: holds {pixels.dtype} {pixels.shape} for {count} samples; delete it, and it is made again"
        )
    return pixels
