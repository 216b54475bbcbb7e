"""Bytes of encoded samples: whole small files, and ranges of large ones (shards), of which descriptors stay open."""

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pipelines.errors import DataError, UnreachableError

# A data set of a few hundred shards stays open altogether; a larger one costs an `open` now and then.
MOST_OPEN = 512
MOST_BYTES = 2**60
# A range of so many bytes is looked for before memory is asked for it.
_LARGE = 2**26
# What is wrong with one file, or with the path that a manifest gives it; all else is wrong with the storage.
_OF_THE_FILE = (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)


class Files(Protocol):
    """What a data set's files are read through. Safe to use from many threads; another process gets it by pickling.

    Attributes:
        own_limit: a read that is stuck ends by itself; otherwise whoever waits for it has to look at the clock.
    """

    own_limit: bool

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `offset` on, or all of the file from there on.

        Args:
            path: relative to the root, with forward slashes.

        Raises:
            UnreachableError: the storage is away or fails, or the root is gone: no single file is to blame.
            DataError: the file is missing, unreadable or shorter than that, or its path leaves the root.
        """
        ...

    def expect(self, path: str, offset: int, size: int) -> None:
        """Say that this range is read soon, so that the storage can begin with it. Never fails: `read` will."""
        ...


class LocalFiles:
    """Files below a folder. Pickles as the folder.

    A range is read with one system call from a descriptor that stays open. A file that is removed meanwhile can still
    be read through it; one that was replaced is seen as it was until its descriptor is given up.
    """

    own_limit = False

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._prefix = f"{self.root}/"
        prefix = self._prefix
        # Without `self`, so that all is closed as soon as nobody refers to this any more.
        self._open = lambda path: os.open(prefix + path, os.O_RDONLY | os.O_CLOEXEC)
        self._kept = Kept(self._open)

    def __repr__(self) -> str:
        return f"<LocalFiles {self.root}>"

    def __reduce__(self) -> tuple[Callable[..., "LocalFiles"], tuple[Path]]:
        return LocalFiles, (self.root,)

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """See `Files.read`."""
        if path[:1] == "/" or ".." in path:
            refuse_outside(path, self._prefix)
        if size is not None and not 0 <= offset <= offset + size <= MOST_BYTES:
            raise short(self._prefix + path, offset, size)
        try:
            if size is not None:
                data = read_range(self._kept.get(path), offset, size)
            else:
                # A small file: it is not worth keeping it open.
                data = read_rest(Descriptor(self._open(path)), offset)
        except OSError as error:
            self._kept.forget(path)
            raise unreadable(self._prefix + path, error, self._prefix) from None
        if size is not None and len(data) != size:
            self._kept.forget(path)
            raise short(self._prefix + path, offset, size)
        return data

    def expect(self, path: str, offset: int, size: int) -> None:
        """See `Files.expect`: the kernel reads the range into its page cache."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._kept.get(path).number, offset, size, os.POSIX_FADV_WILLNEED)


class Descriptor:
    """An open file, closed when nobody refers to it any more: whoever reads from it keeps it open."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class Kept:
    """Open files by path, a bounded number of them; any thread may use it."""

    def __init__(self, open_file: Callable[[str], int]) -> None:
        """`open_file` returns the descriptor of a path."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = MOST_OPEN if soft == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, soft // 4))
        self._open_file = open_file
        self._kept: dict[str, Descriptor] = {}
        self._keeping = threading.Lock()

    def get(self, path: str) -> Descriptor:
        """The open file; raises whatever opening it raises."""
        descriptor = self._kept.get(path)
        if descriptor is None:
            descriptor = Descriptor(self._open_file(path))
            with self._keeping:
                while len(self._kept) >= self._most:
                    # The one opened first: to note each use would cost more than an `open` now and then.
                    self._kept.pop(next(iter(self._kept)), None)
                self._kept[path] = descriptor
        return descriptor

    def forget(self, path: str) -> None:
        """Open it again next time."""
        with self._keeping:
            self._kept.pop(path, None)

    def forget_removed(self) -> None:
        """Give up files that have been removed: their space on the disk is free only then."""
        with self._keeping:
            gone = [path for path, descriptor in self._kept.items() if os.fstat(descriptor.number).st_nlink == 0]
            for path in gone:
                del self._kept[path]


def read_range(descriptor: Descriptor, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, fewer only at the end of the file; raises OSError."""
    if size > _LARGE:
        # Damage may ask for more than there is memory, of a file that is small.
        size = min(size, max(0, os.fstat(descriptor.number).st_size - offset))
    data = os.pread(descriptor.number, size, offset)
    if len(data) == size or not data:
        return data
    parts, have = [data], len(data)
    while have < size and (part := os.pread(descriptor.number, size - have, offset + have)):
        parts.append(part)
        have += len(part)
    return b"".join(parts)


def read_rest(descriptor: Descriptor, offset: int) -> bytes:
    """All bytes from `offset` on; raises OSError."""
    # The end tells the size at a third of fstat's price, and one read then suffices.
    end = os.lseek(descriptor.number, 0, os.SEEK_END)
    if end > MOST_BYTES:
        # Some file systems say so of folders.
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return read_range(descriptor, offset, max(0, end - offset))


def open_files(root: Path | str, known: Mapping[str, tuple[int, str]] | None = None) -> Files:
    """The files below a folder, or below a URL such as s3://bucket/folder, kept where `remote.use_cache` says.

    Args:
        known: path -> (bytes, sha256 in hex) of what is to be found below a URL; see `remote.RemoteFiles`.
    """
    if "://" in str(root):
        from pipelines import remote

        return remote.open_remote(str(root), known)
    return LocalFiles(root)


def refuse_outside(path: str, root: str) -> None:
    """Raise DataError if the relative `path` leaves `root`."""
    if path.startswith("/") or ".." in path.split("/"):
        raise DataError(f"the path {path!r} leaves the data folder {root.rstrip('/')}; make the manifest again")


def unreadable(path: str, error: OSError, root: str) -> DataError:
    """The error for a file that is missing or cannot be read; UnreachableError unless the file itself is to blame."""
    why = error.strerror or error
    if error.errno not in _OF_THE_FILE:
        return UnreachableError(f"{path}: cannot be read ({why}); check the disk, or the server it is mounted from")
    if error.errno == errno.ENOENT and _is_gone(root):
        return UnreachableError(f"{path}: cannot be read: {root} is gone or empty; mount it again, or restore it")
    return DataError(f"{path}: cannot be read ({why}); restore it")


def short(path: str, offset: int, size: int) -> DataError:
    """The error for a file that ends too early."""
    return DataError(f"{path}: ends before the {size} bytes at {offset}; it is truncated, restore it")


def _is_gone(root: str) -> bool:
    """Whether a folder does not exist, or is empty, as the place of a disk is that is not mounted."""
    try:
        with os.scandir(root) as entries:
            return next(entries, None) is None
    except OSError as error:
        # One that may be entered but not listed is there.
        return error.errno != errno.EACCES
