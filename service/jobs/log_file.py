"""Reading a log that grows: whole, its last lines, or on and on. Imports no torch."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from service import plain_files

_PIECE = 64 << 10
_LOOK_S = 0.25
# How long nothing is yielded while nothing is written.
_SILENCE_S = 1.0
# attempts/N/NAME, below the folder of the job.
_DEPTH = 3


def read(
    path: Path,
    *,
    tail: int | None = None,
    follow: Callable[[], bool] | None = None,
    lives: Callable[[], bool] | None = None,
) -> Iterator[bytes]:
    """What the file holds, in pieces; nothing if it is no regular file, or a link is on the way from the job's folder.

    Args:
        path: attempts/N/NAME in the job's folder.
        tail: its last lines only.
        follow: go on while this says so; b"" comes about once a second while nothing else does.
        lives: whether it is still written to. Once it is not, what it holds then is the end.
    """
    offset = _start_of_tail(path, tail) if tail is not None else 0
    told = time.monotonic()
    while True:
        # Asked before the reading: what was written until then is read.
        goes_on = follow is not None and follow() and (lives is None or lives())
        for piece in _from(path, offset):
            offset += len(piece)
            told = time.monotonic()
            yield piece
            if follow is not None and not follow():
                return
        if not goes_on:
            return
        if time.monotonic() - told >= _SILENCE_S:
            told = time.monotonic()
            yield b""
        time.sleep(_LOOK_S)


def opened(path: Path) -> BinaryIO:
    """The file itself; raises OSError if it is no regular one, or a link is on the way from the job's folder."""
    return plain_files.reading(path.parents[_DEPTH - 1], "/".join(path.parts[-_DEPTH:]))


def _from(path: Path, offset: int) -> Iterator[bytes]:
    try:
        with opened(path) as file:
            file.seek(offset)
            while piece := file.read(_PIECE):
                yield piece
    except OSError:
        return


def _start_of_tail(path: Path, lines: int) -> int:
    """The byte where the last `lines` lines begin."""
    try:
        with opened(path) as file:
            end = start = file.seek(0, 2)
            if lines <= 0:
                return end
            found = 0
            while start > 0:
                size = min(_PIECE, start)
                file.seek(start - size)
                piece = file.read(size)
                # The end of the last line is no beginning of another.
                upto = len(piece) - 1 if start == end and piece.endswith(b"\n") else len(piece)
                while (upto := piece.rfind(b"\n", 0, upto)) >= 0:
                    found += 1
                    if found == lines:
                        return start - size + upto + 1
                start -= size
            return 0
    except OSError:
        return 0
