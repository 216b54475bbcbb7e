"""Files in the folder of a job, opened such that no link leads elsewhere. Imports no torch.

Jobs write where the service reads, and may put links there at any moment. So every step of the way below the job's
folder is opened without following links, what was opened is looked at before it is used, and nothing is opened twice.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


@contextlib.contextmanager
def opened(folder: Path, parts: Sequence[str] = (), *, make: bool = False) -> Iterator[int]:
    """The descriptor of a folder below `folder`; raises OSError if it is not there, or a link is on the way.

    Args:
        make: those that are missing.
    """
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, _FOLDER)
    try:
        for part in parts:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
            below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def regular(path: Path | str, flags: int, place: int | None = None) -> int:
    """The descriptor of a regular file; raises OSError for anything else, a link among them, and waits for no pipe.

    Args:
        flags: as for `os.open`.
        place: descriptor of the folder that `path` is relative to.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644, dir_fd=place)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return descriptor


def reading(folder: Path, name: str) -> BinaryIO:
    """A regular file below `folder`, as run/report.html; raises OSError if it is none, or a link is on the way."""
    *above, last = _parts(name)
    with opened(folder, above) as place:
        return os.fdopen(regular(last, os.O_RDONLY, place), "rb")


def text(folder: Path, name: str, most_bytes: int = 16 << 20) -> str:
    """What a regular file holds at its beginning; raises OSError as `reading`."""
    with reading(folder, name) as file:
        return file.read(most_bytes).decode(errors="replace")


def end(folder: Path, name: str, most_bytes: int) -> tuple[bytes, int]:
    """The last bytes of a regular file, and how many are before them; raises OSError as `reading`."""
    with reading(folder, name) as file:
        before = max(0, os.fstat(file.fileno()).st_size - most_bytes)
        file.seek(before)
        return file.read(most_bytes), before


@contextlib.contextmanager
def writing(folder: Path, name: str) -> Iterator[BinaryIO]:
    """A file below `folder` that is there whole once the block has ended well; folders on the way are made.

    Raises:
        OSError: it cannot be written, or a link is on the way.
    """
    *above, last = _parts(name)
    beside = f".{last}.writing"
    with opened(folder, above, make=True) as place:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside, dir_fd=place)
        with os.fdopen(os.open(beside, _WRITE, 0o644, dir_fd=place), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, last, src_dir_fd=place, dst_dir_fd=place)
        os.fsync(place)


def _parts(name: str) -> list[str]:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise OSError(f"{name!r} is no name of a file below a folder")
    return parts
