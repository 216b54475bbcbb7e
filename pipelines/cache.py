"""Where what is derived from a data folder is kept, and how it is written: whole or absent, by one process at once."""

import contextlib
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import DataError


def beside(root: Path) -> Path:
    """Where it is kept by whoever can write to the data folder; others may read it there."""
    return root / ".lorot"


def folder(root: Path) -> Path:
    """`beside(root)`, created; on a read-only data folder one of its own below the user's cache folder instead.

    Raises:
        DataError: neither can be written.
    """
    own = beside(root)
    user = user_folder(hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16])
    for candidate in (own, user):
        with contextlib.suppress(OSError):
            candidate.mkdir(parents=True, exist_ok=True)
            if os.access(candidate, os.W_OK | os.X_OK):
                return candidate
    raise DataError(f"neither {own} nor {user} can be written; make one writable, or set XDG_CACHE_HOME")


def user_folder(name: str) -> Path:
    """A folder below the user's cache folder, not yet created."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorot" / name


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A file to write beside `path` that takes its place at the end, or vanishes on an error.

    With `durable` its content reaches the disk first, so that a power cut leaves the old file or the new one.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        if durable:
            put(partial, path)
        else:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def put(partial: Path, path: Path) -> None:
    """Move a file to its place, once the disk has its content."""
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(path)


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Hold the folder's lock: workers that start together build once and the others wait. Freed if its holder dies."""
    with (cache / "lock").open("w") as lock:
        # Some network file systems know no locks; whoever comes last then writes the same content again.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
