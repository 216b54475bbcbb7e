"""A part of a file, as browsers and programs ask for one (RFC 9110, section 14): one range of bytes at a time."""

import hashlib
import os
import re

from service.api.faults import RangeError

# As many digits as any file's size could have.
_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,19})-([0-9]{0,19})[ \t]*", re.IGNORECASE)


def tag(state: os.stat_result) -> str:
    """An entity tag, which is another one whenever the file is another one or was written to."""
    told = f"{state.st_dev}:{state.st_ino}:{state.st_size}:{state.st_mtime_ns}"
    return f'"{hashlib.sha256(told.encode()).hexdigest()[:32]}"'


def wanted(asked: str | None, only_if: str | None, size: int, entity: str) -> tuple[int, int] | None:
    """The first byte that is asked for and the one after the last; None for the whole file.

    What is no range, and several of them, is passed over, as the standard allows: the whole file answers it too.

    Args:
        asked: the header Range.
        only_if: the header If-Range; with another tag in it the whole file is wanted.
        entity: the file's tag.

    Raises:
        RangeError: nothing of the file lies there.
    """
    found = _RANGE.fullmatch(asked) if asked is not None else None
    if found is None or (only_if is not None and only_if.strip() != entity):
        return None
    first, last = found[1], found[2]
    if not first and not last:
        return None
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            # Backwards it is no range at all.
            return None
    if start >= end:
        raise RangeError(f"the file has {size:,} bytes, and nothing of it lies in {asked!r}", size)
    return start, end


__all__ = ["tag", "wanted"]
