"""Remote files (s3://, gs://, http(s)://, whatever fsspec knows), kept whole in a cache folder of the node.

A file is downloaded once for all processes of a node, when it is first read: written beside its place, checked for its
size (and for its sha256, where that is known), renamed. Copies of a known content carry its sha256 in their name: when
the source changes, those of before are neither used nor mixed with the new ones. Downloads are serialised per file by a
lock that the kernel frees if its holder dies; what a dead one left half-written is removed by the next. When the cache
grows beyond its limit, the files not used for longest go. One may go while somebody reads it: on Linux its descriptor
stays valid, and its space is freed with the last one. What else is in the cache folder is neither counted nor touched.
Credentials are fsspec's own business: the usual environment variables and files of each service.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pipelines import cache
from pipelines.errors import DataError, UnreachableError
from pipelines.files import MOST_BYTES, Kept, read_range, read_rest, refuse_outside, short, unreadable

# What is kept on a node, if nobody says otherwise.
LIMIT_BYTES = 100 * 10**9
# A storage that sends nothing for so long is away.
TIMEOUT_S = 60.0
# Downloads at once in a process: more share one line.
MOST_DOWNLOADS = 4
# How often a file's last use is noted, and how often a waiting process looks again.
NOTE_S = 30.0
LOOK_S = 0.05
FIRST_PAUSE_S = 0.25
# The folder below the cache folder that is this module's own, and what it calls the folders in there.
_OWN = "lorot-remote"
_OWN_FOLDER = re.compile(r".+-[0-9a-f]{12}")
# Told to the client of s3://, which would otherwise try for minutes.
_S3 = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 2}}}

_settings: tuple[Path | None, int] = (None, LIMIT_BYTES)


def use_cache(folder: Path | str | None, limit_bytes: int = LIMIT_BYTES) -> None:
    """Say where this process keeps remote files, and how much of them; None: in the user's cache folder."""
    global _settings
    _settings = (Path(folder) if folder is not None else None, limit_bytes)


def open_remote(url: str, known: Mapping[str, tuple[int, str]] | None = None) -> "RemoteFiles":
    """The files below `url`, in the cache that `use_cache` chose; `known` as for `RemoteFiles`."""
    folder, limit_bytes = _settings
    if folder is None:
        folder = cache.user_folder("remote")
    return RemoteFiles(url, folder, limit_bytes, TIMEOUT_S, known)


class RemoteFiles:
    """Files below a URL, read from their copies in `cache_folder`. Pickles as its arguments.

    Args:
        limit_bytes: of all copies in the folder, whatever URL they are of; one file is always allowed.
        timeout_s: after so long without an answer, or without progress of a download, the storage counts as away.
        known: path -> (bytes, sha256 in hex) of files whose content is known beforehand. They are checked when they
            have come, and a copy of another content is not used for them.
    """

    own_limit = True

    def __init__(
        self,
        url: str,
        cache_folder: Path | str,
        limit_bytes: int,
        timeout_s: float = TIMEOUT_S,
        known: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.cache_folder = Path(cache_folder)
        self.limit_bytes = limit_bytes
        self.timeout_s = timeout_s
        self.known = known or {}
        scheme, _, rest = self.url.partition("://")
        readable = urllib.parse.quote(rest, safe="").replace("%2F", "-")[-40:]
        self._own = self.cache_folder / _OWN
        self._folder = self._own / f"{scheme}-{readable}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"
        self._kept = Kept(self._open)
        self._noted: dict[str, float] = {}
        self._downloads = threading.BoundedSemaphore(MOST_DOWNLOADS)
        self._expected: set[str] = set()

    def __repr__(self) -> str:
        return f"<RemoteFiles {self.url} in {self.cache_folder}>"

    def __reduce__(self) -> tuple[Callable[..., "RemoteFiles"], tuple[Any, ...]]:
        return RemoteFiles, (self.url, self.cache_folder, self.limit_bytes, self.timeout_s, self.known)

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """See `pipelines.files.Files.read`; the first read of a file downloads it.

        Raises:
            UnreachableError: the storage cannot be reached, or refuses, or holds no longer what is known of it.
            DataError: there is no such file, or it is too short, or the cache folder cannot be written.
        """
        if path[:1] == "/" or ".." in path:
            refuse_outside(path, self.url)
        if size is not None and not 0 <= offset <= offset + size <= MOST_BYTES:
            raise short(f"{self.url}/{path}", offset, size)
        try:
            descriptor = self._kept.get(path)
            data = read_rest(descriptor, offset) if size is None else read_range(descriptor, offset, size)
        except OSError as error:
            self._kept.forget(path)
            raise unreadable(str(self._place(path)), error, str(self._folder)) from None
        if size is not None and len(data) != size:
            raise short(f"{self.url}/{path}", offset, size)
        now = time.monotonic()
        if now - self._noted.get(path, 0.0) > NOTE_S:
            self._noted[path] = now
            self._note_use(path)
        return data

    def expect(self, path: str, offset: int, size: int) -> None:
        """See `pipelines.files.Files.expect`: the file is downloaded in the background."""
        if path not in self._expected and not self.has_copy(path):
            self._expected.add(path)
            threading.Thread(target=self._fetch_quietly, args=(path,), name="downloader", daemon=True).start()

    def has_copy(self, path: str) -> bool:
        """Whether the file would be read without a download."""
        return self._place(path).exists()

    def download(self, path: str, target: Path) -> None:
        """Write the file, as it is at its source now, to a place outside the cache.

        Raises:
            UnreachableError, DataError: as `read`.
        """
        try:
            self._download(path, target, lambda size: None)
        except OSError as error:
            raise unwritable(target, error) from None

    def _place(self, path: str) -> Path:
        place = self._folder / path
        return place.with_name(f"{self.known[path][1][:16]}-{place.name}") if path in self.known else place

    def _fetch_quietly(self, path: str) -> None:
        with contextlib.suppress(DataError, OSError):
            self._kept.get(path)
        self._expected.discard(path)

    def _note_use(self, path: str) -> None:
        try:
            os.utime(self._place(path))
        except OSError:
            # It was evicted: to go on with the descriptor would keep its space from being freed.
            self._kept.forget(path)

    def _open(self, path: str) -> int:
        target = self._place(path)
        while True:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return os.open(target, os.O_RDONLY | os.O_CLOEXEC)
            with self._downloads:
                self._fetch(path, target)

    def _fetch(self, path: str, target: Path) -> None:
        """Download a file to its place, unless another thread or process does."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.cache_folder, error) from None
        partial = target.with_name(f".{target.name}.partial")
        try:
            with _locked(_lock_of(partial), partial, self.timeout_s) as held:
                if target.exists():
                    return
                if not held:
                    raise UnreachableError(
                        f"{self.url}/{path}: another process of this node downloads it and has made no progress for "
                        f"{self.timeout_s:.0f} s; check the network"
                    )
                try:
                    self._download(path, partial, lambda size: self._make_room(partial, size))
                    self._check(path, partial)
                    cache.put(partial, target)
                    # Whoever reads from one of them still holds it.
                    self._kept.forget_removed()
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(partial, error) from None

    def _download(self, path: str, partial: Path, make_room: Callable[[int], None]) -> None:
        """Get the whole file, with several tries; raises UnreachableError, DataError, OSError (of the local disk)."""
        deadline, pause = time.monotonic() + self.timeout_s, FIRST_PAUSE_S
        while True:
            transfer = Transfer(f"{self.url}/{path}", partial, make_room)
            problem = transfer.run(self.timeout_s)
            if problem is None:
                return
            if transfer.final or time.monotonic() + pause > deadline:
                # A whole shard is missing: that is no fault of the sample that was asked for.
                raise UnreachableError(str(problem)) if path in self.known else problem
            time.sleep(pause)
            pause *= 2

    def _check(self, path: str, partial: Path) -> None:
        """Raise UnreachableError if what came is not what is known; raises OSError of the local disk."""
        if path not in self.known:
            return
        size, digest = self.known[path]
        found = partial.stat().st_size
        with partial.open("rb") as file:
            if found == size and hashlib.file_digest(file, "sha256").hexdigest() == digest:
                return
        raise UnreachableError(
            f"{self.url}/{path}: not the file that the set was opened with ({found:,} bytes of {size:,}, or another "
            "sha256): the set has changed, or is damaged; start again to use it as it is now, or upload it again"
        )

    def _make_room(self, partial: Path, size: int) -> None:
        """Set `size` bytes aside for `partial`; for them, remove what was not used for longest.

        Downloads of other threads and processes count as what they will be; what dead ones left is removed.
        """
        with cache.locked(self._own):
            copies, excess = [], size - self.limit_bytes
            for path in self._own_files():
                with contextlib.suppress(FileNotFoundError):
                    found = path.lstat()
                    hidden = path.name.startswith(".")
                    if hidden and path.suffix == ".partial":
                        if path == partial:
                            continue
                        if _is_held(_lock_of(path)):
                            excess += max(found.st_size, _set_aside(path))
                        else:
                            path.unlink()
                    elif stat.S_ISREG(found.st_mode) and not (hidden and path.suffix == ".lock"):
                        copies.append((found.st_mtime, found.st_size, path))
                        excess += found.st_size
            _lock_of(partial).write_text(f"{size}")
            for _, taken, path in sorted(copies):
                if excess <= 0:
                    return
                path.unlink(missing_ok=True)
                excess -= taken

    def _own_files(self) -> Iterator[Path]:
        """What lies in the folders that this class makes, of all URLs."""
        for folder in self._own.iterdir():
            if _OWN_FOLDER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                yield from folder.rglob("*")


class Transfer:
    """One try to download one file, on a thread that can be left behind.

    Attributes:
        final: trying again would not help.
    """

    def __init__(self, url: str, partial: Path, make_room: Callable[[int], None]) -> None:
        self.final = True
        self._url, self._partial, self._make_room = url, partial, make_room
        self._progress = time.monotonic()
        self._abandoned = False
        self._error: BaseException | None = None

    def run(self, timeout_s: float) -> DataError | None:
        """Why it failed, or None; raises OSError of the local disk."""
        self._partial.touch()
        thread = threading.Thread(target=self._work, name="transfer", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_S)
            if thread.is_alive() and time.monotonic() - self._progress > timeout_s:
                self._abandoned = True
                return self._away(f"nothing has come for {timeout_s:.0f} s")
        match self._error:
            case None:
                return None
            case OSError(errno=errno.ENOSPC | errno.EDQUOT) as error:
                raise error
            case DataError() as error:
                return error
            case FileNotFoundError(__cause__=cause) if not isinstance(cause, OSError):
                return DataError(f"{self._url}: no such file; restore it, or check the name of the bucket or server")
            case PermissionError() as error:
                return self._away(f"access refused: {error}")
            case ImportError() as error:
                return DataError(f"{self._url}: {error}; for s3:// there is `pip install 'lorot[remote]'`")
            case ValueError() as error:
                return DataError(f"{self._url}: no URL that can be read ({error}); write one as s3://bucket/folder")
            case error:
                self.final = False
                return self._away(f"{type(error).__name__}: {error}".removesuffix(": "))

    def advance(self) -> None:
        """Some of it has come; raises if nobody waits for it any more."""
        if self._abandoned:
            raise ConnectionAbortedError
        self._progress = time.monotonic()

    def _away(self, why: str) -> UnreachableError:
        return UnreachableError(
            f"{self._url}: cannot be downloaded ({why}); check the network, the address (AWS_ENDPOINT_URL for an S3 "
            "server of your own) and the credentials"
        )

    def _work(self) -> None:
        try:
            self._copy()
        except BaseException as error:
            self._error = error

    def _copy(self) -> None:
        # Only here: most data sets are local.
        import fsspec

        transfer = self

        class Progress(fsspec.callbacks.Callback):
            def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
                transfer.advance()

        system, path = fsspec.core.url_to_fs(self._url, **(_S3 if self._url.startswith("s3://") else {}))
        # What was listed before may have changed.
        system.invalidate_cache()
        size = system.info(path).get("size")
        self.advance()
        self._make_room(size or 0)
        system.get_file(path, str(self._partial), callback=Progress())
        found = self._partial.stat().st_size
        if size is None:
            self._make_room(found)
        elif found != size:
            raise EOFError(f"{found} of {size} bytes came")


def unwritable(path: Path, error: OSError) -> DataError:
    """The error for a cache folder that takes nothing."""
    said = f"{path}: cannot be written ({error.strerror or error}); free space, set a smaller data.cache_gb"
    return DataError(f"{said}, or (not in jobs of a service) data.cache_folder")


def _lock_of(partial: Path) -> Path:
    return partial.with_suffix(".lock")


def _set_aside(partial: Path) -> int:
    """How large a download will be, if it is known yet: its holder wrote it into its lock."""
    try:
        return int(_lock_of(partial).read_text() or 0)
    except (OSError, ValueError):
        return 0


def _is_held(lock: Path) -> bool:
    """Whether a living process holds this lock."""
    with contextlib.suppress(FileNotFoundError), lock.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextlib.contextmanager
def _locked(path: Path, partial: Path, timeout_s: float) -> Iterator[bool]:
    """Hold a file's lock; false if its holder made no progress with `partial` for `timeout_s`."""
    # What its holder wrote into it stays.
    with path.open("a") as lock:
        progress, seen = time.monotonic(), -1
        while not (held := _acquire(lock)):
            with contextlib.suppress(OSError):
                if partial.stat().st_size != seen:
                    progress, seen = time.monotonic(), partial.stat().st_size
            if time.monotonic() - progress > timeout_s * 2:
                break
            time.sleep(LOOK_S)
        yield held


def _acquire(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems know no locks: then two may download the same content.
        pass
    return True
