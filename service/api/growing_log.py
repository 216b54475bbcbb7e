"""A log that grows, read by any number of followers: one look at it for all, one thread at most, little memory."""

import asyncio
import bisect
import contextlib
import math
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.errors import LorotError
from service.jobs import log_file
from service.jobs.places import Placed, PlaceLostError

# Seconds between two looks at a file.
POLL_S = 0.25
# A tail whose job is never silent begins with what has come in so many seconds.
SETTLES_S = 2.0
# Of one event at most; a longer line is told in pieces.
PIECE_BYTES = 64 * 1024
# Pieces that several followers share: those who keep up all want the same ones.
_SHARED = 4


class GrowingLog:
    """Bytes that are added to at the end, as far as they have come. Made, used and closed in the event loop.

    Attributes:
        size: bytes that there were so far.
        spool_bytes: how many of the last ones are kept, where no file has them; 0 where one has all.
        more: set when there is more, or nothing more will come; another one afterwards.
        settled: what was there at first has been found, so that its last lines can be told.
        done: nothing will be added any more.
        problem: why it ended early; "" if it did not.
        users: followers that have it open.
        is_tail: it does not begin with the log's first byte, so that offsets in it are counted from places in it.
        is_lost: it was to begin at a place that is not to be found any more.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.size = 0
        self.settled = False
        self.done = False
        self.problem = ""
        self.users = 0
        self.is_tail = False
        self.is_lost = False
        self.spool_bytes = 0
        self.more = asyncio.Event()
        self._written = 0
        # Where the places of a tail are, in their order, as far back as somebody may ask.
        self._places: list[tuple[int, str]] = []
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._file: int | None = None
        self._pieces: OrderedDict[int, asyncio.Future[bytes]] = OrderedDict()
        self._stopped = threading.Event()
        # Held while the file is opened, used or closed: a number that was let go may be another file's.
        self._opening = threading.Lock()
        self._task: asyncio.Task[None] | None = None

    def watch(self, path: Path, has_ended: Callable[[], bool]) -> None:
        """Follow a file that somebody else writes; `has_ended` says whether they have ended, and may block."""
        self._task = self._loop.create_task(self._watch(path, has_ended))

    def pump(
        self, pieces: Callable[[Callable[[], bool]], Iterator[bytes]], spool_bytes: int, *, place: str = ""
    ) -> None:
        """Follow what no file holds, through a file of our own that nobody else sees: a ring of its last bytes.

        Args:
            pieces: given what says whether to go on, the bytes in their order; b"" where there are none just now.
            spool_bytes: how many of them are kept.
            place: where a tail begins; "" for all lines.
        """
        self.spool_bytes = spool_bytes
        self.is_tail = bool(place)
        if place:
            self._places.append((0, place))
        with tempfile.TemporaryFile(buffering=0) as spool:
            self._file = os.dup(spool.fileno())
        threading.Thread(target=self._pump, args=(pieces,), name="lorot-log", daemon=True).start()

    @property
    def start(self) -> int:
        """The first byte that can still be read."""
        return max(0, self._written - self.spool_bytes) if self.spool_bytes else 0

    @property
    def middle(self) -> int:
        """Half-way through what can still be read."""
        return (self.start + self._written) // 2

    def placed(self, offset: int) -> str:
        """`offset` as others find it too: itself in a log that begins with its first byte, else BYTES@PLACE."""
        if not self.is_tail:
            return str(offset)
        begin, place = self._places[bisect.bisect_right(self._places, offset, key=lambda known: known[0]) - 1]
        return f"{offset - begin}@{place}"

    def find(self, place: str) -> int | None:
        """Where it comes by this place; None if it has not, or not lately."""
        return next((begin for begin, known in self._places if known == place), None)

    async def changed(self, more: asyncio.Event, seconds: float) -> bool:
        """Wait until there is more than when `more` was taken, or the end; False if that takes longer."""
        try:
            await asyncio.wait_for(more.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def read(self, offset: int) -> bytes:
        """What there is at `offset`, `PIECE_BYTES` at most."""
        reading = self._pieces.get(offset)
        if reading is None or (reading.done() and len(reading.result()) < PIECE_BYTES):
            reading = self._loop.run_in_executor(self._pool, self._read, offset, PIECE_BYTES)
            self._pieces[offset] = reading
            self._pieces.move_to_end(offset)
            if len(self._pieces) > _SHARED:
                self._pieces.popitem(last=False)
        return await asyncio.shield(reading)

    async def start_of_last(self, lines: int) -> int:
        """Where the last so many lines begin."""
        return await self._loop.run_in_executor(self._pool, self._start_of_last, lines, self.size)

    def wake(self) -> None:
        """Let all followers look again."""
        self.more.set()
        self.more = asyncio.Event()

    def close(self) -> None:
        """Let go of it, once the last follower has left."""
        if self._task is not None:
            self._task.cancel()
        with self._opening:
            self._stopped.set()
            if self._file is not None:
                os.close(self._file)
                self._file = None

    async def _watch(self, path: Path, has_ended: Callable[[], bool]) -> None:
        while not self.done:
            try:
                ended, size = await self._loop.run_in_executor(self._pool, self._look, path, has_ended)
            except LorotError as error:
                self._note(self.size, done=True, problem=str(error))
                return
            self._note(size, done=ended)
            await asyncio.sleep(POLL_S)

    def _look(self, path: Path, has_ended: Callable[[], bool]) -> tuple[bool, int]:
        # In this order: what is written before the end is all there then.
        ended = has_ended()
        with self._opening:
            if self._file is None and not self._stopped.is_set():
                # A job may put a link in the place of its log; where that leads is nobody's business here.
                with contextlib.suppress(OSError), log_file.opened(path) as file:
                    self._file = os.dup(file.fileno())
            return ended, 0 if self._file is None else os.fstat(self._file).st_size

    def _pump(self, pieces: Callable[..., Iterator[bytes]]) -> None:
        problem, latest_s = "", math.inf
        try:
            for piece in pieces(lambda: not self._stopped.is_set()):
                if self._stopped.is_set():
                    return
                if self.is_tail and isinstance(piece, Placed):
                    self._note_place(piece.place)
                self._keep(piece)
                now_s = time.monotonic()
                # One that has all lines may have a long way to its last ones: a tail is asked for beside it until then.
                latest_s = min(latest_s, now_s + SETTLES_S) if self.is_tail else latest_s
                self._tell(self._written, settled=not piece or now_s > latest_s)
        except (LorotError, OSError) as error:
            problem, self.is_lost = str(error), isinstance(error, PlaceLostError)
        self._tell(self._written, settled=True, done=True, problem=problem)

    def _note_place(self, place: str) -> None:
        """What comes next begins at this place."""
        # One that others know goes before the name that this tail was given.
        places = [*(known for known in self._places if known[0] != self._written), (self._written, place)]
        # Somebody may just have read what is thrown away now.
        first = bisect.bisect_right(places, self.start - self.spool_bytes, key=lambda known: known[0]) - 1
        self._places = places[max(0, first) :]

    def _keep(self, data: bytes) -> None:
        while data:
            with self._opening:
                if self._file is None:
                    return
                place = self._written % self.spool_bytes
                num_bytes = os.pwrite(self._file, data[: self.spool_bytes - place], place)
                self._written += num_bytes
            data = data[num_bytes:]

    def _tell(self, size: int, *, settled: bool = False, done: bool = False, problem: str = "") -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(lambda: self._note(size, settled, done=done, problem=problem))

    def _note(self, size: int, settled: bool = True, *, done: bool = False, problem: str = "") -> None:
        news = size > self.size or done or (settled and not self.settled)
        self.size, self.done, self.problem = max(size, self.size), done, problem
        self.settled = settled or self.settled
        if news:
            self.wake()

    def _read(self, offset: int, most: int) -> bytes:
        with self._opening:
            if self._file is None or offset < self.start:
                return b""
            if not self.spool_bytes:
                return os.pread(self._file, most, offset)
            most, place = min(most, self._written - offset), offset % self.spool_bytes
            first = os.pread(self._file, min(most, self.spool_bytes - place), place)
            return first + os.pread(self._file, most - len(first), 0) if len(first) < most else first

    def _start_of_last(self, lines: int, size: int) -> int:
        """Backwards, a block at a time. A line end at the very end begins no further line."""
        left, end = lines, size
        while end > (first := self.start):
            start = max(first, end - PIECE_BYTES)
            block = self._read(start, end - start)
            position = len(block) - 1 if end == size and block.endswith(b"\n") else len(block)
            while (position := block.rfind(b"\n", 0, position)) >= 0:
                left -= 1
                if left <= 0:
                    return start + position + 1
            end = start
        return self.start


def cut(data: bytes, final: bool) -> int:
    """How many of these bytes are whole lines, and can be told.

    A line ends with LF, CR or CRLF. What is not a line yet waits for its end, unless it is very long or the last word.
    """
    if final and len(data) < PIECE_BYTES:
        return len(data)
    # The LF of a CRLF may be still to come.
    lines = max(data.rfind(b"\n"), data.rfind(b"\r", 0, -1)) + 1
    if lines or len(data) < PIECE_BYTES:
        return lines
    # Not within a character of UTF-8, which has four bytes at most.
    for back in range(1, 4):
        if data[-back] & 0xC0 != 0x80:
            needed = 4 if data[-back] >= 0xF0 else 3 if data[-back] >= 0xE0 else 2 if data[-back] >= 0xC0 else 1
            return len(data) - back if needed > back else len(data)
    return len(data)
