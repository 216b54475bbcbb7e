"""What the host does with pixels, compiled by Numba: the only place that imports it.

Compiled once per machine and kept in the user's cache folder, below the digest of these sources and the version that
compiled them: an edited kernel is never mistaken for the one that was compiled before. Where that folder cannot be
written, kernels are compiled again by each process, which takes about twenty seconds.
"""

import contextlib
import hashlib
import logging
import os
import stat
from pathlib import Path
from typing import Any

import numba

from pipelines import cache

_log = logging.getLogger(__name__)

# Of a pickle, which Numba's files are.
_END = b"."


def _keep() -> bool:
    """Point Numba at the folder of these sources' machine code; whether there is one.

    What lies there is run, so a folder that others can write is not used.
    """
    hashed = hashlib.sha256(numba.__version__.encode())
    own = Path(__file__).parent
    # The operations' codes are compiled in.
    for source in (*sorted(own.glob("*.py")), own.parent / "augment" / "operations.py"):
        hashed.update(source.read_bytes())
    try:
        folder = cache.user_folder("kernels") / hashed.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = folder.stat()
        if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"others can write {folder}")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not writable")
        _drop_damaged(folder)
    except (OSError, RuntimeError) as error:
        # RuntimeError: a user without a home.
        _log.warning("compiled kernels cannot be kept (%s); set XDG_CACHE_HOME to a folder of your own", error)
        return False
    numba.config.CACHE_DIR = str(folder)
    return True


def _drop_damaged(folder: Path) -> None:
    """Remove what is not whole: Numba syncs nothing, so a power cut may empty it, and it starts with no such file."""
    for path in (*folder.glob("*/*.nbi"), *folder.glob("*/*.nbc")):
        # Another process may do so as well; one that reads it meanwhile compiles.
        with contextlib.suppress(FileNotFoundError):
            if not _is_whole(path):
                path.unlink()


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(_END)))
        return file.read() == _END


# Of every kernel. The sums are short, so that their order does not matter to 8 bits; no exceptions, no index checks.
OPTIONS: dict[str, Any] = {
    "cache": _keep(),
    "nogil": True,
    "fastmath": True,
    "error_model": "numpy",
    "boundscheck": False,
}
