"""A prepared data set: what `lorot data prepare SRC DST` writes, in a folder or below a URL.

    ROOT/set.json   ROOT/train.arrow   ROOT/train-000000.tar ...

Opening looks at `set.json`, at the sizes of the shards and at the manifest, which may come from anywhere; not at the
samples: `lorot data verify` looks at all bytes.
Of a set below a URL (s3://bucket/folder, https://host/folder) `set.json` is fetched each time; the manifest that it
names is kept in the user's cache folder, by its sha256; shards come when their samples are read, and are checked then.
"""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines import cache, manifest, prepared_set
from pipelines.columns import view
from pipelines.errors import DataError, UnreachableError
from pipelines.files import LocalFiles
from pipelines.manifest import Heading, Manifest
from pipelines.prepared_set import MEND, File, Split
from pipelines.remote import RemoteFiles, open_remote

_log = logging.getLogger(__name__)

_UPLOAD = "prepare the set with this version of the program, and upload it again"
# Rows looked at together: what is worked out for them stays in the processor's cache.
_ROWS = 1 << 16
_NUMBERS = {"label": pa.int64(), "height": pa.int64(), "width": pa.int64()}
_PLACES = {"shard": pa.int32(), "offset": pa.int64(), "size": pa.int64()}
_MASKS = {"mask_offset": pa.int64(), "mask_size": pa.int64()}
_OTHERS = {"path": pa.large_string(), "checksum": pa.uint64(), "boxes": pa.large_list(pa.list_(pa.float32(), 4))}


def load(root: Path | str, split: str) -> Manifest:
    """The manifest of one split.

    Args:
        root: folder or URL of the set.
        split: "train", "val", ...

    Raises:
        UnreachableError: the set lies below a URL that cannot be reached, and is not here as a whole.
        DataError: no such set or split, or a shard or the manifest is missing, truncated or inconsistent.
    """
    where = str(root).rstrip("/")
    if "://" in where:
        return _load_remote(where, split)
    if not (Path(root) / prepared_set.NAME).exists():
        unfinished = (Path(root) / ".prepare").exists()
        hint = f"unfinished; {MEND}" if unfinished else "make one with `lorot data prepare SRC DST`"
        raise DataError(f"{where}: no prepared set (there is no {prepared_set.NAME}); {hint}")
    about = _choose(prepared_set.read(LocalFiles(root), where), split, where)
    for file in (about.manifest, *about.shards):
        _check_size(Path(root), file)
    return _open(Path(root) / about.manifest.path, root, split, about, f"copy it here again, or {MEND}")


def _choose(splits: dict[str, Split], split: str, where: str) -> Split:
    if split not in splits:
        raise DataError(f"{where}: no split {split!r}; there are {', '.join(splits) or 'none'}")
    return splits[split]


def _check_size(root: Path, file: File) -> None:
    try:
        size = (root / file.path).stat().st_size
    except OSError as error:
        raise DataError(f"{root / file.path}: missing ({error.strerror}); copy it here again, or {MEND}") from None
    if size != file.bytes:
        raise DataError(
            f"{root / file.path}: truncated or of another set: {size:,} of {file.bytes:,} bytes; copy it here again, "
            f"or {MEND}"
        )


def _open(path: Path, root: Path | str, split: str, about: Split, mend: str) -> Manifest:
    """The manifest, which must say what `set.json` says and point nowhere but into the shards."""
    heading, batch = manifest.read_file(path, mend)
    shards = tuple(shard.path for shard in about.shards)
    said = (about.digest, split, about.classes, about.class_ids, shards, about.samples)
    if (heading.digest, heading.split, heading.classes, heading.class_ids, heading.shards, len(batch)) != said:
        raise DataError(f"{path}: not the manifest that {prepared_set.NAME} speaks of; {mend}")
    try:
        _check(heading, batch, np.array([shard.bytes for shard in about.shards], np.int64))
        return Manifest(path, root, heading, batch)
    except DataError:
        raise
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path}: a damaged manifest ({error}); {mend}") from None


def _check(heading: Heading, batch: pa.RecordBatch, shard_bytes: np.ndarray) -> None:
    """Raise ValueError or ArrowException unless a manifest is sound whoever wrote it; `shard_bytes` is (shards,)."""
    batch.validate(full=True)
    kinds = {field.name: field.type for field in batch.schema}
    needed = _NUMBERS | _PLACES | (_MASKS if kinds.keys() & _MASKS.keys() else {})
    if len(kinds) != len(batch.schema) or kinds != needed | {name: _OTHERS[name] for name in _OTHERS if name in kinds}:
        raise ValueError(f"its columns are {batch.schema.to_string(show_schema_metadata=False)!r}")
    if heading.array is not None or heading.mask_threshold is not None:
        raise ValueError("its samples lie in an array, not in shards")
    parts = [*batch.columns]
    if "boxes" in kinds:
        parts += [batch.column("boxes").values, batch.column("boxes").values.flatten()]
    if any(part.null_count for part in parts):
        raise ValueError("it has gaps")
    last = 0
    for start in range(0, len(batch), _ROWS):
        rows = {name: view(batch.column(name))[start : start + _ROWS] for name in needed}
        shards = rows["shard"]
        _refuse(start, (rows["label"] < 0) | (rows["label"] >= len(heading.classes)), "a label without a class")
        _refuse(start, (rows["height"] < 0) | (rows["width"] < 0), "a height or width below 0")
        _refuse(start, (shards < 0) | (shards >= len(shard_bytes)), "a shard that is not there")
        _refuse(start, np.diff(shards, prepend=np.int32(last)) < 0, "a shard before that of the row before")
        last, ends = shards[-1], shard_bytes[shards]
        _refuse(start, _outside(rows["offset"], rows["size"], ends) | (rows["size"] == 0), "a place outside its shard")
        if "mask_size" in needed:
            _refuse(start, _outside(rows["mask_offset"], rows["mask_size"], ends), "a mask outside its shard")


def _outside(offsets: np.ndarray, sizes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    # Not as a sum, which might overflow.
    outside: np.ndarray = (offsets < 0) | (sizes < 0) | (offsets > ends - sizes)
    return outside


def _refuse(start: int, wrong: np.ndarray, what: str) -> None:
    if wrong.any():
        raise ValueError(f"row {start + int(wrong.argmax())} has {what}")


def _load_remote(where: str, split: str) -> Manifest:
    folder = cache.user_folder("sets") / hashlib.sha256(where.encode()).hexdigest()[:16]
    files = open_remote(where)
    latest = folder / "latest.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # It takes its place with the manifest that it names, so that without a network both are there.
        with cache.replacing(latest) as partial:
            files.download(prepared_set.NAME, partial)
            about = _choose(prepared_set.parse(partial.read_bytes(), where), split, where)
            path = _fetch(files, where, folder, about)
    except UnreachableError as error:
        about = _find_whole(latest, where, split, error)
        path = _kept(folder, about.manifest)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({error.strerror or error}); free space, or set XDG_CACHE_HOME"
        ) from None
    total = sum(shard.bytes for shard in about.shards)
    if total > files.limit_bytes:
        _log.warning(
            "%s: the shards of split %s take %.3g GB, and %.3g GB of remote files are kept here: in global order a "
            "whole shard may be downloaded for each sample; set data.cache_gb above %.3g, or data.order=blocks",
            *(where, split, total / 1e9, files.limit_bytes / 1e9, total / 1e9),
        )
    return _open(path, where, split, about, _UPLOAD)


def _kept(folder: Path, file: File) -> Path:
    """Where the copy of a manifest lies, by its content: another version never takes its place."""
    return folder / f"{file.sha256[:16]}-{file.path}"


def _fetch(files: RemoteFiles, where: str, folder: Path, about: Split) -> Path:
    """A local copy of the manifest, with what is known of its shards beside it."""
    path = _kept(folder, about.manifest)
    if not _is_whole(path, about.manifest):
        with cache.replacing(path) as partial:
            files.download(about.manifest.path, partial)
            if not _is_whole(partial, about.manifest):
                raise DataError(
                    f"{where}/{about.manifest.path}: not the manifest that {prepared_set.NAME} speaks of; "
                    "upload both again"
                )
    prepared_set.write_known(path, about.shards)
    return path


def _is_whole(path: Path, file: File) -> bool:
    try:
        if path.stat().st_size != file.bytes:
            return False
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
    except FileNotFoundError:
        return False


def _find_whole(latest: Path, where: str, split: str, error: UnreachableError) -> Split:
    """The split as it was when it was last opened, if all of it is here; raises UnreachableError if not."""
    try:
        about = _choose(prepared_set.parse(latest.read_bytes(), where), split, where)
    except (OSError, DataError):
        raise error from None
    path = _kept(latest.parent, about.manifest)
    whole = _is_whole(path, about.manifest)
    files = open_remote(where, prepared_set.read_known(path))
    here = sum(files.has_copy(shard.path) for shard in about.shards)
    if not whole or here < len(about.shards):
        raise UnreachableError(
            f"{error}; of what was last opened from there, {here} of {len(about.shards)} shards are kept here: too few "
            "to go on without it"
        )
    _log.warning("%s; all of split %s is kept here as it was last opened, and is used as it was then", error, split)
    return about
