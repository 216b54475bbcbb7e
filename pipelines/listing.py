"""The files of a data folder: which there are, whether they changed, and what their headers say."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines import image_header
from pipelines.errors import DataError
from pipelines.image_header import HeaderError

# Files opened at once. One thread reads as fast as several from a warm cache; they overlap the waiting on a cold or
# a network disk, and the wait is all there is to overlap, so there may be many more of them than cores.
READERS = 16
# Nearly every header lies within the first bytes, which also serve to tell files of one name and size apart.
FIRST_BYTES = 4096
_UNREADABLE = (0, 0, 1)


class File(NamedTuple):
    """A file: its path relative to the root with forward slashes, size in bytes, modification time in ns."""

    path: str
    size: int
    mtime_ns: int


class Headers(NamedTuple):
    """What the headers of N images say.

    Attributes:
        heights, widths: (N,) int64 pixels of the image as shown (EXIF orientation applied), 0 where unreadable.
        hashes: (N,) uint64 of the first bytes.
        orientations: (N,) uint8, EXIF's 1 to 8: how the stored picture is turned to be shown.
    """

    heights: np.ndarray
    widths: np.ndarray
    hashes: np.ndarray
    orientations: np.ndarray


def files(root: Path, folder: str = "", endings: tuple[str, ...] = ()) -> list[File]:
    """All files below `root/folder` with one of the endings (lower case; all files if none), sorted by path.

    Links are followed; a folder is entered once. Names that begin with a dot are left out.
    """
    found: list[File] = []
    waiting = [folder]
    entered = set()
    while waiting:
        inside = waiting.pop()
        about = os.stat(root / inside)
        if (about.st_dev, about.st_ino) in entered:
            continue
        entered.add((about.st_dev, about.st_ino))
        with os.scandir(root / inside) as entries:
            for item in entries:
                if item.name.startswith("."):
                    continue
                path = f"{inside}/{item.name}" if inside else item.name
                if item.is_dir():
                    waiting.append(path)
                elif not endings or item.name.lower().endswith(endings):
                    about = _stat(item)
                    if stat.S_ISREG(about.st_mode):
                        found.append(File(path, about.st_size, about.st_mtime_ns))
        # Of two links to one folder always the same is taken.
        waiting.sort(reverse=True)
    for entry in found:
        if not entry.path.isascii():
            _refuse_unreadable_name(root, entry.path)
    return sorted(found)


def file(root: Path, path: str) -> File | None:
    """One file, or None if it is not there."""
    try:
        about = os.stat(root / path)
    except OSError:
        return None
    return File(path, about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else None


def folders(root: Path, folder: str = "") -> list[str]:
    """Names of the folders in `root/folder`, sorted, without hidden ones; empty if it is no folder."""
    if not (root / folder).is_dir():
        return []
    with os.scandir(root / folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def fingerprint(listing: Iterable[File], *more: object) -> str:
    """sha256 hex over paths, sizes and modification times, and over whatever else decides (options, versions)."""
    hashed = hashlib.sha256(repr(more).encode())
    for entry in listing:
        hashed.update(f"{entry.path}\0{entry.size}\0{entry.mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()


def read_headers(root: Path, paths: Sequence[str]) -> Headers:
    """The headers of encoded images, in parallel; heights and widths are 0 for a file that has no readable one."""
    table = np.zeros((len(paths), 3), np.int64)
    hashes = np.zeros(len(paths), np.uint64)

    def read(start: int, stop: int) -> None:
        for index in range(start, stop):
            table[index], hashes[index] = _header(f"{root}/{paths[index]}")

    # Handing over single files would cost more than reading them.
    starts = range(0, len(paths), 256)
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda start: read(start, min(start + 256, len(paths))), starts):
            pass
    return Headers(table[:, 0].copy(), table[:, 1].copy(), hashes, table[:, 2].astype(np.uint8))


def digest(parts: Iterable[object]) -> str:
    """sha256 hex of a content listing: text, bytes or arrays, in order; no part runs into the next."""
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            content = part.astype(part.dtype.newbyteorder("<")).tobytes()
            hashed.update(f"{part.dtype.str[1:]}{part.shape}".encode())
        else:
            content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        hashed.update(len(content).to_bytes(8, "little") + content)
    return hashed.hexdigest()


def _header(path: str) -> tuple[tuple[int, int, int], int]:
    """(height, width, orientation), and the hash of the first bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return _UNREADABLE, 0
    try:
        first = os.read(descriptor, FIRST_BYTES)
        header = image_header.parse(first)
        if header is None and len(first) == FIRST_BYTES:
            # A long EXIF or ICC block stands before it; or a format that is known by its end as well. Unbuffered,
            # since nearly all that is read is a few bytes far apart.
            with open(descriptor, "rb", buffering=0, closefd=False) as stream, contextlib.suppress(HeaderError):
                header = image_header.read(stream)
    except OSError:
        return _UNREADABLE, 0
    finally:
        os.close(descriptor)
    hashed = int.from_bytes(hashlib.blake2b(first, digest_size=8).digest(), "little")
    return (header.height, header.width, header.orientation) if header else _UNREADABLE, hashed


def _refuse_unreadable_name(root: Path, path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(f"{str(root / path)!r}: a file name that is not UTF-8; rename or remove the file") from None


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError as error:
        raise DataError(f"{entry.path}: cannot be read ({error.strerror}); restore or remove it") from None
