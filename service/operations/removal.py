"""Removing files and folders below a root, safely.

Jobs write where this removes, and may put links there at any moment. So every step of the way is opened without
following links and everything is done relative to what is open: nothing outside the root can be reached. What goes is
renamed first: after a crash it lies under a name that is nobody's, and the next one clears it away.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from service.plain_files import opened

LEAVING = ".leaving"
_TRIMMING = ".trimming"
_CHUNK_BYTES = 1 << 20


def names(root: Path, parts: Sequence[str] = ()) -> list[str]:
    """What lies in a folder below `root`, sorted; empty if it is none."""
    try:
        with opened(root, parts) as folder:
            return sorted(os.listdir(folder))
    except OSError:
        return []


def is_folder(root: Path, parts: Sequence[str]) -> bool:
    """Whether a real folder lies there, no link on the way."""
    try:
        with opened(root, parts):
            return True
    except OSError:
        return False


def state_of(root: Path, parts: Sequence[str]) -> os.stat_result | None:
    """Of a regular file, no link on the way; None if there is none."""
    try:
        with opened(root, parts[:-1]) as folder:
            state = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None
    return state if stat.S_ISREG(state.st_mode) else None


def measure(root: Path, parts: Sequence[str], by_reading: bool = False) -> tuple[int, float]:
    """Bytes of all regular files in a folder, and when any entry was last written to, seconds since the epoch.

    Args:
        by_reading: or read.

    Raises:
        OSError: there is no such folder.
    """
    num_bytes, newest_s = 0, 0.0
    with opened(root, parts) as folder:
        for _, _, files, descriptor in os.fwalk(".", follow_symlinks=False, dir_fd=folder):
            newest_s = max(newest_s, os.fstat(descriptor).st_mtime)
            for name in files:
                with contextlib.suppress(FileNotFoundError):
                    state = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                    newest_s = max(newest_s, state.st_mtime, state.st_atime if by_reading else 0.0)
                    num_bytes += state.st_size if stat.S_ISREG(state.st_mode) else 0
    return num_bytes, newest_s


def remove(root: Path, parts: Sequence[str]) -> None:
    """Remove a folder and all in it. Under a name that is nobody's from the first moment on; raises OSError."""
    *above, name = parts
    with opened(root, above) as folder:
        leaving = name if is_leaving(name) else f".{name.lstrip('.')}{LEAVING}"
        if leaving != name:
            # A folder cannot take the place of one that an earlier crash has left.
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(leaving, dir_fd=folder)
            os.rename(name, leaving, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        shutil.rmtree(leaving, dir_fd=folder)


def is_leaving(name: str) -> bool:
    """Whether an entry of this name is on its way out."""
    return name.startswith(".") and name.endswith(LEAVING)


def trim(root: Path, parts: Sequence[str], keep_bytes: int) -> None:
    """Cut a file of text to its last lines, `keep_bytes` at most, below a line that says so; raises OSError."""
    *above, name = parts
    with opened(root, above) as folder:
        beside = f".{name}{_TRIMMING}"
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
        try:
            state = os.fstat(source)
            if state.st_size <= keep_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside, dir_fd=folder)
            target = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
            with os.fdopen(target, "wb") as file, os.fdopen(os.dup(source), "rb") as text:
                note = f"[lorot gc: of {state.st_size} bytes the last lines]\n".encode()
                text.seek(state.st_size - max(0, keep_bytes - len(note)))
                text.readline(_CHUNK_BYTES)
                file.write(note)
                shutil.copyfileobj(text, file, _CHUNK_BYTES)
                file.flush()
                os.fchmod(target, stat.S_IMODE(state.st_mode))
                with contextlib.suppress(PermissionError):
                    os.fchown(target, state.st_uid, state.st_gid)
                os.fsync(target)
            os.rename(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            os.close(source)
