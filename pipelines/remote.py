"""Remote files (s3://, gs://, http(s)://, whatever fsspec knows), kept whole in a cache folder of the node.

A file is downloaded once for all processes of a node, when it is first read: written beside its place, checked for its
size, renamed. Downloads are serialised per file by a lock that the kernel frees if its holder dies; what a dead one
left half-written is removed by the next. When the cache grows beyond its limit, the files that were not used for
longest go. One may go while somebody reads it: on Linux its descriptor stays valid, and its space is freed with the
last one.

Credentials are fsspec's own business: the usual environment variables and files of each service.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipelines import cache
from pipelines.errors import DataError, UnreachableError
from pipelines.files import Kept, read_range, read_rest, refuse_outside, short, unreadable

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
# Told to the client of s3://, which would otherwise try for minutes.
_S3 = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 2}}}

_settings: tuple[Path | None, int] = (None, LIMIT_BYTES)


def use_cache(folder: Path | str | None, limit_bytes: int = LIMIT_BYTES) -> None:
    """Say where this process keeps remote files, and how much of them; None: in the user's cache folder."""
    global _settings
    _settings = (Path(folder) if folder is not None else None, limit_bytes)


def open_remote(url: str) -> "RemoteFiles":
    """The files below `url`, in the cache that `use_cache` chose."""
    folder, limit_bytes = _settings
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorot" / "remote"
    return RemoteFiles(url, folder, limit_bytes)


class RemoteFiles:
    """Files below a URL, read from their copies in `cache_folder`. Pickles as its arguments.

    Args:
        limit_bytes: of all copies in the folder, whatever URL they are of; one file is always allowed.
        timeout_s: after so long without an answer, or without progress of a download, the storage counts as away.
    """

    own_limit = True

    def __init__(self, url: str, cache_folder: Path | str, limit_bytes: int, timeout_s: float = TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        self.cache_folder = Path(cache_folder)
        self.limit_bytes = limit_bytes
        self.timeout_s = timeout_s
        scheme, _, rest = self.url.partition("://")
        readable = urllib.parse.quote(rest, safe="").replace("%2F", "-")[-40:]
        self._folder = self.cache_folder / f"{scheme}-{readable}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"
        self._kept = Kept(self._open)
        self._noted: dict[str, float] = {}
        self._downloads = threading.BoundedSemaphore(MOST_DOWNLOADS)
        self._expected: set[str] = set()

    def __repr__(self) -> str:
        return f"<RemoteFiles {self.url} in {self.cache_folder}>"

    def __reduce__(self) -> tuple[Callable[..., "RemoteFiles"], tuple[str, Path, int, float]]:
        return RemoteFiles, (self.url, self.cache_folder, self.limit_bytes, self.timeout_s)

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """See `pipelines.files.Files.read`; the first read of a file downloads it.

        Raises:
            UnreachableError: the storage cannot be reached, or refuses.
            DataError: there is no such file, or it is too short, or the cache folder cannot be written.
        """
        if path[:1] == "/" or ".." in path:
            refuse_outside(path, self.url)
        try:
            descriptor = self._kept.get(path)
            data = read_rest(descriptor, offset) if size is None else read_range(descriptor, offset, size)
        except OSError as error:
            self._kept.forget(path)
            raise unreadable(str(self._folder / path), error) from None
        if size is not None and len(data) != size:
            raise short(f"{self.url}/{path}", offset, size)
        now = time.monotonic()
        if now - self._noted.get(path, 0.0) > NOTE_S:
            self._noted[path] = now
            self._note_use(path)
        return data

    def expect(self, path: str, offset: int, size: int) -> None:
        """See `pipelines.files.Files.expect`: the file is downloaded in the background."""
        if path not in self._expected and not (self._folder / path).exists():
            self._expected.add(path)
            threading.Thread(target=self._fetch_quietly, args=(path,), name="downloader", daemon=True).start()

    def _fetch_quietly(self, path: str) -> None:
        with contextlib.suppress(DataError, OSError):
            self._kept.get(path)
        self._expected.discard(path)

    def _note_use(self, path: str) -> None:
        try:
            os.utime(self._folder / path)
        except OSError:
            # It was evicted: to go on with the descriptor would keep its space from being freed.
            self._kept.forget(path)

    def _open(self, path: str) -> int:
        target = self._folder / path
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
        with _locked(target.with_name(f".{target.name}.lock"), partial, self.timeout_s) as held:
            if target.exists():
                return
            if not held:
                raise UnreachableError(
                    f"{self.url}/{path}: another process of this node downloads it and has made no progress for "
                    f"{self.timeout_s:.0f} s; check the network"
                )
            try:
                self._download(path, partial)
                partial.replace(target)
                # Whoever reads from one of them still holds it.
                self._kept.forget_removed()
            except OSError as error:
                raise unwritable(partial, error) from None
            finally:
                partial.unlink(missing_ok=True)

    def _download(self, path: str, partial: Path) -> None:
        """Get the whole file, with several tries; raises UnreachableError, DataError, OSError (of the local disk)."""
        deadline, pause = time.monotonic() + self.timeout_s, FIRST_PAUSE_S
        while True:
            transfer = Transfer(f"{self.url}/{path}", partial, self._make_room)
            problem = transfer.run(self.timeout_s)
            if problem is None:
                return
            if transfer.final or time.monotonic() + pause > deadline:
                raise problem
            time.sleep(pause)
            pause *= 2

    def _make_room(self, size: int) -> None:
        """Remove what dead downloads left, and what was not used for longest until `size` more bytes fit."""
        with cache.locked(self.cache_folder):
            copies = []
            for path in self.cache_folder.rglob("*"):
                with contextlib.suppress(FileNotFoundError):
                    if path.name.endswith(".partial"):
                        if not _is_held(path.with_name(path.name.removesuffix(".partial") + ".lock")):
                            path.unlink()
                    elif path.is_file() and not path.name.endswith("lock"):
                        found = path.stat()
                        copies.append((found.st_mtime, found.st_size, path))
            excess = sum(taken for _, taken, _ in copies) + size - self.limit_bytes
            for _, taken, path in sorted(copies):
                if excess <= 0:
                    return
                path.unlink(missing_ok=True)
                excess -= taken


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
        if size is not None and found != size:
            raise EOFError(f"{found} of {size} bytes came")


def unwritable(path: Path, error: OSError) -> DataError:
    """The error for a cache folder that takes nothing."""
    return DataError(f"{path}: cannot be written ({error.strerror or error}); free space, or set data.cache_folder")


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
    with path.open("w") as lock:
        progress, seen = time.monotonic(), -1
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield True
                return
            except BlockingIOError:
                pass
            except OSError:
                # Some network file systems know no locks: then two may download the same content.
                yield True
                return
            with contextlib.suppress(OSError):
                if partial.stat().st_size != seen:
                    progress, seen = time.monotonic(), partial.stat().st_size
            if time.monotonic() - progress > timeout_s * 2:
                yield False
                return
            time.sleep(LOOK_S)
