"""Places in a log that an engine or a cluster keeps: they outlive whoever reads it. Imports no torch.

There nothing counts bytes, and the first ones may be thrown away while the last are written. But every entry (a line,
or a part of a long one) carries the time at which it was written, and a log can be read from a time on. So a place is
an entry, known by its time and its content, and what comes after it is counted in bytes from there. Times are not
unique, nor always in order, as several streams are written to one log; what cannot be found again for certain is lost.
"""

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from service.errors import LorotError

# Bytes from one place to the next: what has to be read twice at most after a restart, and no more text than needed.
APART_BYTES = 64 << 10
# How far entries may be out of their order.
_DISORDER_NS = 1_000_000_000
# 2026-01-01T00:00:00.12Z: how engines and kubelets begin an entry, some without the zeros at the end.
_TIME = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) ")
_PLACE = re.compile(r"([0-9]{1,12})\.([0-9]{9})-([0-9a-f]{8})-([0-9a-f]{8})(~?)")


class PlaceLostError(LorotError):
    """A place in a log is not known, or cannot be told from another one."""


class Placed(bytes):
    """A piece of a log that begins at a place.

    Attributes:
        place: by which `Backend.logs` goes on from here, as text without blanks of 50 characters at most.
    """

    place: str

    def __new__(cls, content: bytes, place: str) -> "Placed":
        made = super().__new__(cls, content)
        made.place = place
        return made


@dataclass(frozen=True)
class Place:
    """An entry of a log.

    Attributes:
        written_ns: when it was written, since the epoch.
        check: sum of its content.
        source: sum of the name of what wrote it.
        is_first: it is known to be the first one in its log of this time and content, so that others may follow.
    """

    written_ns: int
    check: int
    source: int
    is_first: bool

    def __str__(self) -> str:
        seconds, ns = divmod(self.written_ns, 10**9)
        return f"{seconds}.{ns:09d}-{self.check:08x}-{self.source:08x}{'' if self.is_first else '~'}"

    @classmethod
    def parse(cls, text: str) -> "Place":
        """From its text; raises PlaceLostError for what is none."""
        found = _PLACE.fullmatch(text)
        if found is None:
            raise PlaceLostError(f"{text[:60]!r} is no place in a log")
        seconds, ns, check, source, doubt = found.groups()
        return cls(int(seconds) * 10**9 + int(ns), int(check, 16), int(source, 16), not doubt)

    @property
    def since_s(self) -> int:
        """From when on to read in order to find it, in seconds since the epoch."""
        return max(1, (self.written_ns - _DISORDER_NS) // 10**9)

    def is_of(self, source: str) -> bool:
        """Whether what is called so wrote it."""
        return self.source == zlib.crc32(source.encode())

    def find(self, entries: Iterable[bytes]) -> None:
        """Look for it in what there is since `since_s`; raises PlaceLostError."""
        num_found = 0
        for raw in entries:
            written_ns, content = timed(raw)
            num_found += self.is_at(written_ns, content)
            if self.is_past(written_ns) or (num_found and self.is_first):
                break
        if num_found != 1:
            raise PlaceLostError(
                "what was written there is not kept any more" if not num_found else "two lines there are the same"
            )

    def is_at(self, written_ns: int | None, content: bytes) -> bool:
        """Whether it may be this entry."""
        return written_ns == self.written_ns and zlib.crc32(content) == self.check

    def is_past(self, written_ns: int | None) -> bool:
        """Whether it will not come any more after an entry of this time."""
        return written_ns is not None and written_ns > self.written_ns + _DISORDER_NS


class Trail:
    """Takes the times off the entries of one log, in their order, and knows the places that it comes by.

    Args:
        source: what writes the log: a container, a pod.
        is_whole: the entries begin with the log's first one.
        since: the place at which to begin; what comes before it is dropped. The entries are those since its `since_s`.

    Attributes:
        place: the last one that it came by; or else the one at which it is to begin.
    """

    def __init__(self, source: str, *, is_whole: bool = False, since: Place | None = None) -> None:
        self.place = since
        self._source = zlib.crc32(source.encode())
        self._is_whole = is_whole
        # Told since the place; and what of it is still to come once more.
        self._num_bytes = 0
        self._again_bytes = 0
        self._is_sought = since is not None
        self._after_ns: int | None = None
        self._first_ns: int | None = None
        self._latest_ns = -1

    @property
    def has_begun(self) -> bool:
        """Whether it has told anything."""
        return self._first_ns is not None and not (self._is_sought and not self._num_bytes)

    def rewind(self) -> None:
        """The entries come anew: those since `since_s` of its place, or else all as at first."""
        self._is_sought, self._again_bytes = self.place is not None, 0

    def give_up(self) -> None:
        """Its place is lost: what comes anew is told where it is later than what was, as far as times can tell."""
        self.place, self._is_sought, self._again_bytes, self._num_bytes = None, False, 0, 0
        self._after_ns = self._latest_ns

    def take(self, raw: bytes) -> bytes:
        """What is to be told of an entry; `Placed` at a place. Raises PlaceLostError where its place does not come."""
        written_ns, content = timed(raw)
        if self._after_ns is not None:
            if written_ns is None or written_ns <= self._after_ns:
                return b""
            self._after_ns = None
        is_later = written_ns is not None and written_ns > self._latest_ns
        if written_ns is not None:
            self._first_ns = written_ns if self._first_ns is None else self._first_ns
            self._latest_ns = max(self._latest_ns, written_ns)
        if self._is_sought:
            assert self.place is not None
            if not self.place.is_at(written_ns, content):
                if self.place.is_past(written_ns):
                    raise PlaceLostError("what was written there is not kept any more")
                return b""
            self._is_sought, self._again_bytes = False, self._num_bytes
        # The parts of a long line have one time, and may be the same but for its last one.
        elif is_later and written_ns is not None and content.endswith(b"\n") and not self._again_bytes:
            self._note(written_ns, content)
        again = min(self._again_bytes, len(content))
        self._again_bytes -= again
        begins = self.place is not None and not self._num_bytes
        self._num_bytes += len(content) - again
        return Placed(content, str(self.place)) if begins else content[again:]

    def _note(self, written_ns: int, content: bytes) -> None:
        """Make this entry a place, if one is due. None of its time came before it."""
        assert self._first_ns is not None
        # Before where a tail begins there may be others of this time, but not of one that is much later.
        is_first = self._is_whole or written_ns > self._first_ns + _DISORDER_NS
        due = self.place is None or self._num_bytes >= APART_BYTES or (is_first and not self.place.is_first)
        if due:
            self.place = Place(written_ns, zlib.crc32(content), self._source, is_first)
            self._num_bytes = 0


def timed(raw: bytes) -> tuple[int | None, bytes]:
    """(when, what) was written, of an entry that begins with its time: nanoseconds since the epoch, or None."""
    found = _TIME.match(raw)
    if found is None:
        return None, raw
    seconds = _seconds(found[1] + found[3])
    return seconds * 10**9 + int((found[2] or b"").ljust(9, b"0")), raw[found.end() :]


@lru_cache(maxsize=64)
def _seconds(time: bytes) -> int:
    return int(datetime.fromisoformat(time.decode()).timestamp())
