"""One archive: a plain tar of regular files, with a manifest that holds size and SHA-256 of each, and of itself.

    database/ artifacts/N/ state/ jobs/ settings.yaml     whatever the caller puts in
    manifest.json                                         the last one: an archive that was cut short has none

Nothing is compressed, so that no archive unpacks to more than it is. Nothing in it is executed, unpickled or followed.
"""

import contextlib
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from service import scratch_folder
from service.errors import ConfigError, DataError, StorageError
from service.whole_file import flush

FORMAT = 1
MANIFEST = "manifest.json"
_SCRATCH = ".lorot-backup-"
_CHUNK_BYTES = 1 << 20
_LARGEST_MANIFEST_BYTES = 1 << 30
# How often a file is read again that changed under the reading.
_TRIES = 4


@dataclass(frozen=True)
class Manifest:
    """What an archive holds.

    Attributes:
        facts: what the writer had to say, JSON values.
        files: name -> {"bytes", "sha256"}.
    """

    facts: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def num_bytes(self) -> int:
        return sum(int(own["bytes"]) for own in self.files.values())

    def below(self, folder: str) -> list[str]:
        """Names in a folder of the archive."""
        return [name for name in self.files if name.startswith(f"{folder}/")]


class Readable(Protocol):
    """What bytes come from: so many as asked for, fewer only at its end."""

    def read(self, count: int, /) -> bytes: ...


class ShortError(Exception):
    """A file ended before the size that it had."""


class Writer:
    """Adds files to a new archive; made by `writing`.

    Attributes:
        scratch: a folder for what is made to be added, on the archive's own disk; it goes with the writer.
        left_out: what was not added, and why.
    """

    def __init__(self, file: IO[bytes], scratch: Path) -> None:
        self.scratch = scratch
        self._file = file
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._files: dict[str, dict[str, Any]] = {}
        self.left_out: list[str] = []

    def add_file(self, path: Path, name: str) -> None:
        """One file, which has to be there; raises OSError."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            self._add(descriptor, name)
        finally:
            os.close(descriptor)

    def add_text(self, text: str, name: str) -> None:
        """A small file of this content."""
        content = text.encode()
        self._tar.addfile(_member(name, len(content)), io.BytesIO(content))
        self._files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def add_stream(self, source: Readable, num_bytes: int, name: str, modified_s: int = 0) -> None:
        """So many bytes of a stream. The archive stays as it was if that raises, or ends before with ShortError."""
        begin = self._tar.offset
        reading = _Hashing(source, num_bytes)
        try:
            self._tar.addfile(_member(name, num_bytes, modified_s), reading)  # type: ignore[arg-type]
        except BaseException:
            self._cut(begin)
            raise
        self._files[name] = {"bytes": num_bytes, "sha256": reading.digest.hexdigest()}

    def add_tree(
        self, folder: Path, name: str, omit: Collection[Path] = (), wanted: Callable[[str], bool] = lambda name: True
    ) -> None:
        """Every regular file below a folder; links, sockets and devices are noted in `left_out`, never followed.

        What vanishes meanwhile is passed over, and what grows is taken as long as it was.

        Args:
            omit: files and folders, resolved, that are left out without a note.
            wanted: whether a file or folder of this name is.
        """
        own = os.fstat(self._file.fileno())
        top = folder.resolve()
        for root, folders, files, descriptor in os.fwalk(top, follow_symlinks=False):
            here = Path(root)
            for link in (entry for entry in folders if (here / entry).is_symlink()):
                self.left_out.append(str(here / link))
            folders[:] = sorted(entry for entry in folders if wanted(entry) and here / entry not in omit)
            for entry in sorted(files):
                if not wanted(entry) or here / entry in omit:
                    continue
                try:
                    opened = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
                except FileNotFoundError:
                    continue
                except OSError:
                    self.left_out.append(str(here / entry))
                    continue
                try:
                    state = os.fstat(opened)
                    if not stat.S_ISREG(state.st_mode):
                        self.left_out.append(str(here / entry))
                    elif (state.st_dev, state.st_ino) != (own.st_dev, own.st_ino):
                        self._add(opened, "/".join((name, *(here / entry).relative_to(top).parts)))
                finally:
                    os.close(opened)

    def finish(self, facts: Mapping[str, Any]) -> Manifest:
        """Write the manifest, and everything to the disk."""
        content: dict[str, Any] = {"format": FORMAT, "facts": dict(facts), "files": self._files}
        content["sha256"] = _digest_of(content)
        text = json.dumps(content).encode()
        self._tar.addfile(_member(MANIFEST, len(text)), io.BytesIO(text))
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        return Manifest(facts, self._files)

    def _add(self, descriptor: int, name: str) -> None:
        for again in reversed(range(_TRIES)):
            before, begin = os.fstat(descriptor), self._tar.offset
            os.lseek(descriptor, 0, os.SEEK_SET)
            with os.fdopen(os.dup(descriptor), "rb") as source:
                try:
                    self.add_stream(source, before.st_size, name, int(before.st_mtime))
                except ShortError:
                    continue
            after = os.fstat(descriptor)
            is_still = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
            # What only grew is good as far as it was read.
            if is_still or (not again and after.st_size >= before.st_size):
                return
            del self._files[name]
            self._cut(begin)
        self.left_out.append(f"{name} (it kept changing)")

    def _cut(self, begin: int) -> None:
        """Take away what was written from there on."""
        self._file.seek(begin)
        self._file.truncate()
        self._tar.offset = begin


@contextlib.contextmanager
def writing(target: Path) -> Iterator[Writer]:
    """A new archive, which is there whole or not at all, readable by its owner alone.

    Raises:
        ConfigError: something is there already.
        StorageError: it cannot be written.
    """
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target}: is there already and is not overwritten; name a new file")
    try:
        with scratch_folder.made(target.parent, _SCRATCH) as scratch:
            beside = scratch / "archive"
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w+b") as file:
                yield Writer(file, scratch)
            if target.exists():
                raise ConfigError(f"{target}: has been made by another program meanwhile and is not overwritten")
            beside.rename(target)
            flush(target.parent)
    except OSError as error:
        raise StorageError(f"{target}: the archive cannot be made ({error.strerror or error})") from None


class Reader:
    """An archive whose manifest and names have been checked; made by `reading`."""

    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self.path = path
        self._tar = tar
        self._members = _members(path, tar)
        self.manifest = self._manifest()

    def verify(self) -> None:
        """Compare each file with its checksum; raises DataError that names the first that differs."""
        for name in self.manifest.files:
            self._copy(name, None)

    def text(self, name: str) -> str:
        """A small file's content; raises DataError."""
        content = io.BytesIO()
        self._copy(name, content)
        return content.getvalue().decode()

    def stream(self, name: str) -> IO[bytes]:
        """One file's content, without a look at its checksum."""
        source = self._tar.extractfile(self._members[name])
        assert source is not None, "only regular files are among the members"
        return source

    def extract(self, name: str, to: Path, mode: int = 0o666) -> None:
        """Write one file to a path that is not there yet, and compare its checksum on the way.

        Args:
            mode: permissions, of which the process's mask takes away its own.
        """
        to.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            self._copy(name, file)
            file.flush()
            os.fsync(file.fileno())

    def _manifest(self) -> Manifest:
        member = self._members.pop(MANIFEST, None)
        source = self._tar.extractfile(member) if member is not None else None
        if member is None or source is None or member.size > _LARGEST_MANIFEST_BYTES:
            raise DataError(f"{self.path}: has no {MANIFEST}: no backup of lorot, or one that was cut short")
        try:
            content = json.loads(source.read())
            digest = _digest_of(content)
        except (ValueError, AttributeError):
            raise DataError(f"{self.path}: its {MANIFEST} is damaged") from None
        if content.get("sha256") != digest:
            raise DataError(f"{self.path}: the SHA-256 of its {MANIFEST} is not the one written down; it is damaged")
        if content.get("format") != FORMAT:
            raise DataError(f"{self.path}: format {content.get('format')!r}; this version reads format {FORMAT}")
        manifest = Manifest(content["facts"], content["files"])
        if strange := sorted(self._members.keys() ^ manifest.files.keys()):
            raise DataError(f"{self.path}: {strange[0]} is not both in the archive and in its manifest")
        return manifest

    def _copy(self, name: str, to: IO[bytes] | None) -> None:
        expected, digest, size = self.manifest.files[name], hashlib.sha256(), 0
        source = self.stream(name)
        try:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                if to is not None:
                    to.write(chunk)
        except tarfile.TarError as error:
            raise DataError(f"{self.path}: {name}: {error}") from None
        if size != expected["bytes"]:
            raise DataError(f"{self.path}: {name}: {size} bytes, {expected['bytes']} were written; it is truncated")
        if digest.hexdigest() != expected["sha256"]:
            raise DataError(f"{self.path}: {name}: its SHA-256 is not the one written down; it is damaged")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """An archive, opened; raises DataError for what `Writer` would not have written, ConfigError if there is none."""
    with contextlib.ExitStack() as opened:
        try:
            reader = Reader(path, opened.enter_context(tarfile.open(path, mode="r:")))
        except OSError as error:
            raise ConfigError(f"{path}: no archive can be read there ({error.strerror or error})") from None
        except tarfile.TarError as error:
            raise DataError(f"{path}: no archive of `lorot backup`, or a damaged one ({error})") from None
        yield reader


class _Hashing:
    """Reads no more than a number of bytes, and hashes them on the way."""

    def __init__(self, source: Readable, size: int) -> None:
        self._source, self._left = source, size
        self.digest = hashlib.sha256()

    def read(self, count: int) -> bytes:
        content = self._source.read(min(count, self._left))
        if len(content) < min(count, self._left):
            raise ShortError
        self._left -= len(content)
        self.digest.update(content)
        return content


def _member(name: str, size: int, modified_s: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, modified_s, 0o600
    return member


def _members(path: Path, tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """By name; raises DataError for anything but a regular file with a name that stays within the archive."""
    found: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        name = member.name
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise DataError(f"{path}: {name!r} is a link, a device or a folder; a backup holds files alone")
        parts = name.split("/")
        if name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise DataError(f"{path}: {name!r} leads out of the archive; it was not made by `lorot backup`")
        if name in found:
            raise DataError(f"{path}: {name!r} is there twice")
        found[name] = member
    for name in found:
        if any(str(parent) in found for parent in PurePosixPath(name).parents):
            raise DataError(f"{path}: {name!r} lies in a file")
    return found


def _digest_of(content: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
