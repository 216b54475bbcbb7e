"""A prepared data set: what `lorot data prepare SRC DST` writes, in a folder or below a URL.

    ROOT/set.json   ROOT/train.arrow   ROOT/train-000000.tar ...

Opening looks at `set.json` and at the sizes of the shards, not at the samples; `lorot data verify` looks at all bytes.
Of a set below a URL (s3://bucket/folder, https://host/folder) the manifest is fetched once and kept in the user's cache
folder; shards come when their samples are read.
"""

import hashlib
from pathlib import Path

from pipelines import cache, prepared_set
from pipelines.errors import DataError
from pipelines.files import Files, open_files
from pipelines.manifest import Manifest
from pipelines.prepared_set import File, Split

_MEND = (
    "run `lorot data prepare` with the same source and options again: it makes anew what is missing and keeps the rest"
)


def load(root: Path | str, split: str) -> Manifest:
    """The manifest of one split.

    Args:
        root: folder or URL of the set.
        split: "train", "val", ...

    Raises:
        DataError: no such set or split, or a shard or the manifest is missing or truncated.
    """
    where = str(root).rstrip("/")
    remote = "://" in where
    if not remote and not (Path(root) / prepared_set.NAME).exists():
        unfinished = (Path(root) / ".prepare").exists()
        hint = f"unfinished; {_MEND}" if unfinished else "make one with `lorot data prepare SRC DST`"
        raise DataError(f"{where}: no prepared set (there is no {prepared_set.NAME}); {hint}")
    files = open_files(root)
    splits = prepared_set.read(files, where)
    if split not in splits:
        raise DataError(f"{where}: no split {split!r}; there are {', '.join(splits) or 'none'}")
    about = splits[split]
    if remote:
        return Manifest.open(_fetched(files, where, about.manifest), where)
    for file in (about.manifest, *about.shards):
        _check_size(Path(root), file)
    return _checked(Manifest.open(Path(root) / about.manifest.path, root), about)


def _check_size(root: Path, file: File) -> None:
    try:
        size = (root / file.path).stat().st_size
    except OSError as error:
        raise DataError(f"{root / file.path}: missing ({error.strerror}); copy it here again, or {_MEND}") from None
    if size != file.bytes:
        raise DataError(
            f"{root / file.path}: truncated or of another set: {size:,} of {file.bytes:,} bytes; copy it here again, "
            f"or {_MEND}"
        )


def _checked(opened: Manifest, about: Split) -> Manifest:
    if opened.digest != about.digest or len(opened) != about.samples:
        raise DataError(f"{opened.path}: not the manifest that {prepared_set.NAME} speaks of; {_MEND}")
    return opened


def _fetched(files: Files, where: str, file: File) -> Path:
    """A local copy of the manifest, whose name holds its checksum: another version never takes its place."""
    folder = cache.user_folder("sets") / hashlib.sha256(where.encode()).hexdigest()[:16]
    path = folder / f"{file.sha256[:16]}-{Path(file.path).name}"
    if not path.exists() or path.stat().st_size != file.bytes:
        content = files.read(file.path)
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise DataError(
                f"{where}/{file.path}: not the manifest that {prepared_set.NAME} speaks of; upload it again"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with cache.replacing(path) as partial:
            partial.write_bytes(content)
    return path
