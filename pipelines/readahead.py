"""Batches read ahead of the renderer, on as many threads as the storage's latency asks for, within a cap on memory.

Reading threads take the samples of the oldest batch one by one, then those of the next. While reads are fast a single
thread does it all; the longer they take the more join in, as latency times rate says (Little's law). A batch that is
read is planned and prepared on other threads, of which there are as many as decode.

A read that is stuck cannot be interrupted. So all threads here are daemons: nobody waits for them, at the end of the
program neither.
"""

import contextlib
import math
import operator
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any

from pipelines.errors import DataError
from pipelines.reading import Reader, Sample, Slots, Work

# Samples a second that reading is kept ready for at first; more than a few cores decode. It grows if that is too few.
RATE = 4000.0
# Faster reads are the processor's, not the storage's: more threads would not help.
SLOW_S = 1e-3
# Share of the newest read in the average latency.
WEIGHT = 0.05
# What a batch may be larger than the largest before it.
MARGIN = 1.25
# How long a waiting driver sleeps before it looks after the reading threads, and how long `close` waits for them.
LOOK_S = 0.05
CLOSE_S = 1.0


class Fetch:
    """One batch on its way from the storage to the renderer.

    Attributes:
        ready: the batch and what the renderer made of it; or why there is none.
        data: what has been read of it, by id.
        postponed: samples that did not fit into the memory allowed.
    """

    def __init__(self, index: int, slots: Slots, wanted: list[int], reserved: int) -> None:
        self.index = index
        self.slots = slots
        self.ready: Future[tuple[Work[Any], Any]] = Future()
        self.data: dict[int, Sample | None] = {}
        self.postponed: list[int] = []
        self.expected: list[tuple[str, int, int]] = []
        self.reserved = reserved
        self.kept = 0
        self.dropped = False
        self.restart(wanted)

    def restart(self, wanted: list[int]) -> None:
        """Read these samples next."""
        self.left = len(wanted)
        # Shared by the threads that read it: each `next` is atomic.
        self.cursor: Iterator[int] = iter(wanted)


class Watch:
    """What one thread is reading, since when (0: nothing), and for which batch."""

    __slots__ = ("fetch", "sample", "since")

    def __init__(self) -> None:
        self.fetch: Fetch | None = None
        self.sample = -1
        self.since = 0.0


class Readahead:
    """The batches of a schedule in order, each read before it is asked for.

    Its methods are for one driving thread.

    Attributes:
        wait_s: how long the driver has waited for batches.
        peak_bytes: the most encoded bytes that were held at once, from their reading to `release`.
        num_threads: reading threads that have been started.
    """

    def __init__(
        self,
        reader: Reader[Any],
        prepare: Callable[[Work[Any]], Any],
        *,
        depth: int,
        read_threads: int,
        prepare_threads: int,
        limit_bytes: int,
        timeout_s: float,
    ) -> None:
        """`prepare` makes of a batch what the renderer takes; it raises nothing but DataError for a bad sample."""
        self.wait_s = 0.0
        self.peak_bytes = 0
        self.num_threads = 0
        self._reader, self._prepare, self._total = reader, prepare, len(reader.schedule)
        self._depth, self._most_threads = depth, read_threads
        self._timeout_s = math.inf if reader.source.manifest.files.own_limit else timeout_s
        self._requested = self._batch = 0
        self._pending: deque[Fetch] = deque()
        self._closed = False
        self._state = threading.Condition()
        # All below is guarded by it, but the two estimates: a lost update does no harm to an average.
        self._unread: deque[Fetch] = deque()
        self._active = 0
        self._limit, self._reserved, self._kept, self._largest = limit_bytes, 0, 0, 0
        self._latency_s, self._rate = 0.0, RATE
        self._watches: list[Watch] = []
        self._threads: list[threading.Thread] = []
        self._complete: queue.SimpleQueue[Fetch | None] = queue.SimpleQueue()
        # Rewriting an odd image is work for a processor, of which reading threads are no measure.
        self._checking = threading.BoundedSemaphore(prepare_threads)
        for number in range(prepare_threads):
            self._start(self._prepare_batches, f"preparer-{number}")

    def fill(self) -> None:
        """Ask for as many batches as depth and memory allow."""
        while self._requested < self._total:
            # What the threads that are wanted read at once, beside what is planned and prepared.
            if len(self._pending) >= self._depth + math.ceil(self._wanted() / max(1, self._batch)):
                return
            index = self._requested
            slots = self._reader.slots(index)
            wanted = self._reader.wanted(slots)
            self._batch = len(wanted)
            size = self._reader.size_of(wanted, guess=int(self._largest * MARGIN))
            with self._state:
                if self._reserved and self._reserved + size > self._limit:
                    return
                self._reserved += size
            fetch = Fetch(index, slots, wanted, size)
            fetch.expected = self._reader.upcoming(index)
            self._requested += 1
            self._pending.append(fetch)
            self._request(fetch)

    def take(self, wait: bool) -> tuple[Fetch, Work[Any], Any] | None:
        """The next batch, or None: it is not there yet, or (with `wait`) memory does not allow it.

        Raises:
            DataError: the batch cannot be made, or a read of it takes too long.
        """
        self.fill()
        if not self._pending:
            return None
        fetch = self._pending[0]
        if wait:
            began = time.perf_counter()
            try:
                while not fetch.ready.done():
                    if self._closed:
                        raise DataError("the loader was closed while a batch was waited for")
                    if fetch.postponed and not fetch.left and not self._make_room(fetch):
                        return None
                    self._wait_for(fetch)
            finally:
                self.wait_s += time.perf_counter() - began
        # A bad sample is reported when its batch's turn has come.
        elif not fetch.ready.done() or fetch.ready.exception() is not None:
            return None
        work, prepared = fetch.ready.result()
        self._pending.popleft()
        self.fill()
        return fetch, work, prepared

    def release(self, fetch: Fetch) -> None:
        """The batch is rendered, and its bytes are no longer needed."""
        with self._state:
            self._reserved -= fetch.reserved
            self._kept -= fetch.kept
            fetch.reserved = fetch.kept = 0

    def again(self, fetches: list[Fetch]) -> None:
        """Prepare these batches once more, before all others: of their samples some turned out to be bad."""
        for fetch in reversed(fetches):
            fetch.ready = Future()
            self._pending.appendleft(fetch)
        for fetch in fetches:
            self._complete.put(fetch)

    def stop(self) -> None:
        """End all waiting and, as soon as may be, all reading; any thread may call it."""
        with self._state:
            self._closed = True
            self._state.notify_all()

    def close(self) -> None:
        """End the threads, but for those that are stuck."""
        self.stop()
        for _ in self._threads:
            self._complete.put(None)
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._pending.clear()
        self._unread.clear()

    def _start(self, work: Callable[[Watch], None], name: str) -> None:
        watch = Watch()
        self._watches.append(watch)
        self._threads.append(threading.Thread(target=work, args=(watch,), name=name, daemon=True))
        self._threads[-1].start()

    def _wanted(self) -> int:
        """Reading threads that latency and rate ask for."""
        return threads_wanted(self._latency_s, self._rate, self._most_threads)

    def _request(self, fetch: Fetch) -> None:
        """Let the reading threads have it."""
        if not fetch.left:
            self._complete.put(fetch)
            return
        with self._state:
            self._unread.append(fetch)
            self._summon()

    def _summon(self) -> None:
        """See to it that as many threads read as are wanted; under the lock."""
        wanted = self._wanted()
        # Who is woken and finds nothing to read takes the processor from those that decode.
        left = sum(operator.length_hint(fetch.cursor) for fetch in self._unread)
        if wanted > self._active and left:
            self._state.notify(min(wanted - self._active, left))
        while self.num_threads < wanted:
            self.num_threads += 1
            self._start(self._read_batches, f"reader-{self.num_threads}")

    def _read_batches(self, watch: Watch) -> None:
        """What a reading thread does."""
        while True:
            with self._state:
                while not self._closed and ((fetch := self._oldest()) is None or self._active >= self._wanted()):
                    self._state.wait()
                if self._closed or fetch is None:
                    return
                cursor = fetch.cursor
                ranges, fetch.expected = fetch.expected, []
                self._active += 1
            watch.fetch = fetch
            try:
                for piece in ranges:
                    self._reader.source.manifest.files.expect(*piece)
                count = self._read_samples(fetch, cursor, watch)
            except BaseException as error:
                self._fail(fetch, error)
                count = 0
            with self._state:
                self._active -= 1
                if fetch.cursor is cursor and fetch in self._unread:
                    self._unread.remove(fetch)
                fetch.left -= count
                finished = count > 0 and fetch.left == 0 and not fetch.postponed and not fetch.dropped
                if finished:
                    self._settle(fetch)
            if finished:
                self._complete.put(fetch)

    def _oldest(self) -> Fetch | None:
        """The first batch of which nobody reads some samples yet; under the lock."""
        return next((fetch for fetch in self._unread if operator.length_hint(fetch.cursor)), None)

    def _read_samples(self, fetch: Fetch, cursor: Iterator[int], watch: Watch) -> int:
        """Read what nobody else reads of a batch; returns how many that were."""
        count, data = 0, fetch.data
        for sample in cursor:
            count += 1
            if fetch.dropped or self._closed:
                continue
            found = None if fetch.postponed else self._obtain(sample, watch)
            if fetch.postponed or (found is not None and not self._keep(fetch, size_of(found))):
                fetch.postponed.append(sample)
                continue
            data[sample] = found
            more = operator.length_hint(cursor) and self._active < self._most_threads
            if more and self._latency_s * self._rate > self._active:
                with self._state:
                    self._summon()
        return count

    def _obtain(self, sample: int, watch: Watch) -> Sample | None:
        """One sample, read and checked; only what the storage takes for it counts as its latency."""
        watch.sample, watch.since = sample, time.perf_counter()
        try:
            found = self._reader.fetch(sample)
            self._latency_s += WEIGHT * (time.perf_counter() - watch.since - self._latency_s)
        finally:
            watch.since = 0.0
        if not isinstance(found, bytes):
            return found
        with self._checking:
            return self._reader.check(sample, found)

    def _prepare_batches(self, watch: Watch) -> None:
        """What a preparing thread does."""

        def read(sample: int) -> Sample | None:
            return self._obtain(sample, watch)

        while (fetch := self._complete.get()) is not None and not self._closed:
            if fetch.dropped:
                continue
            watch.fetch = fetch
            try:
                while not fetch.ready.done():
                    work = self._reader.complete(fetch.index, fetch.slots, fetch.data, read)
                    prepared = self._prepare(work)
                    if prepared is not None:
                        fetch.ready.set_result((work, prepared))
            except BaseException as error:
                self._fail(fetch, error)

    def _fail(self, fetch: Fetch, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):
            fetch.ready.set_exception(error)

    def _wait_for(self, fetch: Fetch) -> None:
        """Wait a moment for a batch; look after the threads if it does not come."""
        try:
            fetch.ready.exception(timeout=min(LOOK_S, self._timeout_s / 4))
        except TimeoutError:
            now = time.perf_counter()
            reading = [(watch, now - watch.since) for watch in self._watches if watch.since]
            for watch, age in reading:
                if age > self._timeout_s and (watch.fetch is fetch or fetch in self._unread):
                    where = self._reader.source.manifest.describe(watch.sample)
                    raise DataError(
                        f"{where}: a read has not come back for {age:.0f} s; check the disk or the network that it "
                        "lies on, or allow more with data.read_timeout_s"
                    ) from None
            # A read that is not over yet is no part of the average.
            self._latency_s = max([self._latency_s, *(age for _, age in reading)])
        if self._latency_s > SLOW_S and not fetch.ready.done():
            self._rate = min(1.25 * self._rate, 2 * self._most_threads / self._latency_s)
            self._depth += len(self._pending) >= self._depth
            self.fill()
        with self._state:
            if self._unread:
                self._summon()

    def _keep(self, fetch: Fetch, size: int) -> bool:
        """Whether `size` more bytes may be held for a batch: there is room, or it is the only one that holds any."""
        with self._state:
            if fetch.dropped:
                return False
            more = fetch.kept + size - fetch.reserved
            if more > 0:
                if self._reserved + more > self._limit and self._reserved > fetch.reserved:
                    return False
                fetch.reserved += more
                self._reserved += more
            fetch.kept += size
            self._kept += size
            self.peak_bytes = max(self.peak_bytes, self._kept)
            return True

    def _settle(self, fetch: Fetch) -> None:
        """All of a batch is read: what it was expected to need becomes what it needs; under the lock."""
        self._largest = max(self._largest, fetch.kept)
        self._reserved -= fetch.reserved - fetch.kept
        fetch.reserved = fetch.kept

    def _make_room(self, fetch: Fetch) -> bool:
        """Give up the youngest batches until the rest of the oldest fits; false if what is rendered takes its place."""
        while len(self._pending) > 1:
            youngest = self._pending.pop()
            self._requested = youngest.index
            with self._state:
                youngest.dropped = True
                youngest.data = {}
                if youngest in self._unread:
                    self._unread.remove(youngest)
            self.release(youngest)
        with self._state:
            if self._reserved > fetch.reserved:
                return False
        wanted, fetch.postponed = fetch.postponed, []
        fetch.restart(wanted)
        with self._state:
            self._unread.appendleft(fetch)
            self._summon()
        return True


def threads_wanted(latency_s: float, rate: float, most: int) -> int:
    """Reads that have to be under way at once, 1 to `most`, for `rate` samples a second (Little's law)."""
    return max(1, min(most, math.ceil(latency_s * rate)))


def size_of(sample: Sample) -> int:
    """Bytes that a sample takes in memory."""
    return len(sample) if isinstance(sample, bytes) else sample.nbytes
