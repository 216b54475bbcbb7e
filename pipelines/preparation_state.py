"""Where a preparation keeps its files, and whether it may go on with what it finds there."""

import contextlib
import errno
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import features

from pipelines import cache, prepared_set
from pipelines.errors import DataError
from pipelines.files import LocalFiles
from pipelines.manifest import Manifest

# Of the layout of shards and records: another one makes nothing of what this one made.
LAYOUT = 2


@dataclass(frozen=True)
class Place:
    """The files of one split of a prepared set."""

    folder: Path
    split: str

    @property
    def records(self) -> Path:
        """Folder of the shards' records."""
        return self.folder / ".prepare" / self.split

    @property
    def manifest(self) -> Path:
        """The split's manifest."""
        return self.folder / f"{self.split}.arrow"

    @property
    def job(self) -> Path:
        """What the records were made from and with."""
        return self.records / "job.json"

    def shard(self, number: int) -> Path:
        """A shard's tar file."""
        return self.folder / f"{self.split}-{number:06d}.tar"

    def partial(self, number: int) -> Path:
        """A shard in the making."""
        return self.records / f"{number:06d}.tar.partial"

    def record(self, number: int) -> Path:
        """A shard's record."""
        return self.records / f"{number:06d}.npz"

    def size(self, number: int) -> int:
        """Bytes of a shard's tar file; -1 if there is none."""
        try:
            return self.shard(number).stat().st_size
        except FileNotFoundError:
            return -1

    def shards(self) -> list[Path]:
        """All shards and their indices that lie here."""
        digits = "[0-9]" * 6
        return sorted(path for ending in ("tar", "idx") for path in self.folder.glob(f"{self.split}-{digits}.{ending}"))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from preparing the same split here; raises DataError if one does."""
        with (self.records / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Some network file systems know no locks.
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise DataError(
                        f"{self.folder}: another process is preparing split {self.split!r} here; wait for it, or end it"
                    ) from None
            yield


def describe(source: Manifest, options: dict[str, Any]) -> dict[str, Any]:
    """What decides over the bytes of the shards."""
    return {"layout": LAYOUT, "source": describe_source(source), "options": options, "made_with": made_with()}


def made_with() -> dict[str, str]:
    """Versions of the libraries that decode and encode: others may make other bytes of the same image."""
    libraries = {"libjpeg_turbo": "libjpeg_turbo", "zlib": "zlib_ng" if features.check("zlib_ng") else "zlib"}
    return {"pillow": PIL.__version__, **{name: features.version(what) or "" for name, what in libraries.items()}}


def describe_source(source: Manifest) -> dict[str, str]:
    """What a set is prepared from, independent of where it lies."""
    names = {"name": source.name, "split": source.split}
    return {**names, "digest": source.digest, "fingerprint": source.heading.fingerprint}


def agree(place: Place, source: Manifest, options: dict[str, Any], restart: bool) -> None:
    """Make sure that what lies in the folder was made from this source with these options, or is nothing.

    Args:
        restart: remove it if not.

    Raises:
        DataError: it was made otherwise, or by somebody else.
    """
    wanted = describe(source, options)
    found = _found(place)
    trouble = None
    if found is not None:
        trouble = _difference(found, wanted)
    elif there := place.shards():
        trouble = f"{there[0].name} is there, but not what it was made from"
    if trouble and not restart:
        raise DataError(
            f"{place.folder}: {trouble}; choose another folder, or remove what is there of split {place.split!r} with "
            "--restart"
        )
    if trouble or found is None:
        _clear(place)
        with cache.replacing(place.job) as partial:
            partial.write_text(json.dumps(wanted), encoding="utf-8")


def _found(place: Place) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        about = json.loads(place.job.read_text(encoding="utf-8"))
        if isinstance(about, dict):
            return about
    return None


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Why what was found cannot be gone on with, or None if it can."""
    if found == wanted:
        return None
    before, now = found.get("source") or {}, wanted["source"]
    if (before.get("name"), before.get("split")) != (now["name"], now["split"]):
        return f"holds what was prepared from data set {before.get('name')!r}, split {before.get('split')!r}"
    if before.get("digest") != now["digest"]:
        return "the source has changed since this was prepared from it: its files are others, or have other contents"
    if before != now:
        return "the source's files were copied or written again since this was prepared from them"
    options = found.get("options") or {}
    changed = [
        f"{name} {options.get(name)} and not {value}"
        for name, value in wanted["options"].items()
        if options.get(name) != value
    ]
    if not changed and found.get("layout") == wanted["layout"]:
        before, now = found.get("made_with") or {}, wanted["made_with"]
        changed = [f"{name} {before.get(name)} and not {now[name]}" for name in now if before.get(name) != now[name]]
        if changed:
            return f"was prepared by {', '.join(changed)}, which may make other bytes; install that again"
    return f"was prepared with {', '.join(changed) or 'another version of this program'}"


def clear_beyond(place: Place, count: int) -> None:
    """Remove what an earlier preparation left of shards from number `count` on."""
    listed = {
        path for number in range(count) for path in (place.shard(number), place.shard(number).with_suffix(".idx"))
    }
    records = {place.record(number) for number in range(count)}
    for path in (*place.shards(), *place.records.glob("*.npz")):
        if path not in listed and path not in records:
            path.unlink(missing_ok=True)


def refuse_source(source: Manifest, folder: Path) -> None:
    """Raise DataError if preparing into `folder` could overwrite or remove what `source` is read from."""
    if "://" in str(source.root):
        return
    root = Path(source.root)
    inside, around = _lies_in(folder, root), _lies_in(root, folder)
    if (inside and around) or (source.heading.shards and (inside or around)):
        raise DataError(
            f"{folder}: the source lies in {root}, and preparing here would overwrite it; choose another folder, "
            "neither the source's own nor one inside or around it"
        )


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether one folder is the other or lies in it, whatever they are called; either may not be there yet."""
    if not outer.exists():
        return False
    path = inner.resolve()
    return any(above.exists() and above.samefile(outer) for above in (path, *path.parents))


def _clear(place: Place) -> None:
    """Remove what there is of the split: first what names the shards, so that nobody reads a set that is half gone."""
    with cache.locked(place.folder / ".prepare"), contextlib.suppress(DataError):
        splits = prepared_set.read(LocalFiles(place.folder), str(place.folder))
        if splits.pop(place.split, None) is not None:
            prepared_set.write(place.folder, splits)
    for path in (place.manifest, place.job, *place.records.glob("*.npz"), *place.shards()):
        path.unlink(missing_ok=True)
