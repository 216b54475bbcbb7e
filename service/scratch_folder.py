"""A folder for what is in the making, beside the place that it is made for. Imports no torch."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What `tempfile` puts between prefix and suffix: nobody else's folder is to be taken for one that was left.
_MADE, _SUFFIX = "[a-z0-9_]" * 8, ".making"
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextlib.contextmanager
def made(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, gone afterwards; what killed processes have left of this prefix goes first.

    Raises:
        OSError: it cannot be made.
    """
    for left in parent.glob(f"{glob.escape(prefix)}{_MADE}{_SUFFIX}"):
        _clear(left)
    folder, lock = _locked(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder, and the lock that says that it is in use."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, _FLAGS)
            # A file system without locks: nobody can take it for left there.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:
                return folder, lock
            # Somebody who cleared up was faster.
            os.close(lock)


def _clear(folder: Path) -> None:
    """Remove it, unless a living process holds it."""
    try:
        lock = os.open(folder, _FLAGS)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass
    finally:
        os.close(lock)
