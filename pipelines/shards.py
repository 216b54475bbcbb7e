"""Shards: tar files in WebDataset's layout, the same bytes for the same samples whoever writes them and when.

A sample is a run of members of one key: `000000012.jpg` (or .png), `000000012.cls` (its label), `000000012.json` (its
boxes) and `000000012.mask.png`, where it has them. Members carry no time, owner or machine. The first byte of each is
known when it is written, so that one sample can be read from the middle of a shard without a look at the tar structure.

Sources: POSIX.1-1988, ustar interchange format; webdataset.github.io/webdataset (layout); DALI's wds2idx (index).
"""

import struct
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b, sha256
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
# Two empty blocks end an archive, and tar writes whole records of twenty blocks.
_RECORD = tarfile.RECORDSIZE


class Place(NamedTuple):
    """A member's first byte in its shard, and its number of bytes."""

    offset: int
    size: int


class Entry(NamedTuple):
    """What one sample adds to a shard: the bytes of its members, and ending -> place, counted from its own start."""

    content: bytes
    places: dict[str, Place]


class Tar:
    """A shard being written. Not safe to use from several threads.

    Attributes:
        size: bytes so far, without the end of the archive.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = sha256()
        self.size = 0

    def append(self, entries: bytes | memoryview) -> None:
        """Append the content of one or more entries."""
        self._stream.write(entries)
        self._hash.update(entries)
        self.size += len(entries)

    def close(self) -> str:
        """Write the end of the archive; the sha256, in hex, of all that was written. The stream stays open."""
        self.append(bytes(ending_size(self.size)))
        return self._hash.hexdigest()


def entry(key: str, contents: Mapping[str, bytes]) -> Entry:
    """One sample.

    Args:
        key: of all its members; holds no dot and no slash, and differs from that of the sample before.
        contents: ending ("jpg", "cls", "mask.png") -> content.
    """
    parts, places, at = [], {}, 0
    for ending, content in contents.items():
        padding = -len(content) % BLOCK
        parts += [_header(f"{key}.{ending}", len(content)), content, bytes(padding)]
        places[ending] = Place(at + BLOCK, len(content))
        at += BLOCK + len(content) + padding
    return Entry(b"".join(parts), places)


def index(samples: Iterable[tuple[str, Mapping[str, Place]]]) -> str:
    """What DALI's reader wants beside a shard, so that it need not walk through it: a line for each (key, places)."""
    lines = [
        " ".join(f"{ending} {place.offset} {place.size} {key}.{ending}" for ending, place in places.items())
        for key, places in samples
    ]
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])


def index_of(stream: BinaryIO) -> str:
    """The index of a shard, found by its tar structure; raises ValueError where that is damaged."""
    samples: list[tuple[str, dict[str, Place]]] = []
    for name, place in members(stream):
        key, _, ending = name.partition(".")
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        samples[-1][1][ending] = place
    return index(samples)


def ending_size(size: int) -> int:
    """Bytes of the end of an archive whose members take `size`."""
    return 2 * BLOCK + -(size + 2 * BLOCK) % _RECORD


def checksum(*contents: bytes) -> int:
    """64 bits that differ, in all likelihood, when any byte of the contents does."""
    hashed = blake2b(digest_size=8)
    for content in contents:
        hashed.update(content)
    return int(struct.unpack("<Q", hashed.digest())[0])


def members(stream: BinaryIO) -> Iterator[tuple[str, Place]]:
    """Name and place of each member of a shard, in order; raises ValueError where the tar structure is damaged."""
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                yield member.name, Place(member.offset_data, member.size)
    except (tarfile.TarError, struct.error, EOFError) as error:
        raise ValueError(f"no tar file, or a damaged one ({error})") from None


def _header(name: str, size: int) -> bytes:
    """A member's header block; tarfile's own takes ten times as long, which is seen in the rate."""
    if len(name) > 100 or size >= 8**11:
        raise ValueError(f"{name}: {size:,} bytes do not fit into a tar member")
    start = name.encode().ljust(100, b"\0") + b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (0o644, 0, 0, size, 0)
    rest = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    total = sum(start) + 8 * ord(" ") + sum(rest)
    return start + b"%06o\0 " % total + rest
