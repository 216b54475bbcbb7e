"""Every change of a job, told to all who listen: from the controller's thread into the event loop."""

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import AsyncIterator

from service.api import shapes, sse
from service.jobs.job import Job

# Changes that are remembered for those who come back. Who was away for longer is told to look at everything again.
KEPT = 1000


class Changes:
    """The latest changes in order, each as it goes over the wire. Listeners read from it at their own pace.

    An event's id is `SERVICE-NUMBER`, where SERVICE is another one after each start.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._service = secrets.token_hex(4)
        self._events: deque[bytes] = deque(maxlen=kept)
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._more = asyncio.Event()
        self._closed = False

    def open(self) -> None:
        """Take the running event loop for the one that listeners are served by."""
        self._loop = asyncio.get_running_loop()

    def tell(self, job: Job) -> None:
        """From any thread; before `open` and after `close` nobody listens."""
        if self._loop is not None and not self._closed:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._add, job)

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        self._wake()

    async def listen(self, last_id: str = "") -> AsyncIterator[bytes]:
        """Events from now on, or from after `last_id`; `reload` where some of them were forgotten meanwhile."""
        following = self._after(last_id)
        if following is None:
            following = self._count
            if last_id:
                yield self._reload()
        yield sse.KEEPALIVE
        while not self._closed:
            oldest = self._count - len(self._events)
            if following < oldest:
                following = self._count
                yield self._reload()
            elif following < self._count:
                following += 1
                yield self._events[following - 1 - oldest]
            else:
                try:
                    await asyncio.wait_for(self._more.wait(), sse.KEEPALIVE_S)
                except TimeoutError:
                    yield sse.KEEPALIVE

    def _add(self, job: Job) -> None:
        self._count += 1
        self._events.append(sse.json_event(shapes.brief(job), name="job", identifier=self._id()))
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    def _reload(self) -> bytes:
        return sse.json_event({}, name="reload", identifier=self._id())

    def _id(self) -> str:
        return f"{self._service}-{self._count}"

    def _after(self, last_id: str) -> int | None:
        """The number of events up to and with this one; None if it is not one that we know what follows on."""
        service, _, number = last_id.partition("-")
        if service != self._service or not number.isdecimal() or len(number) > 18:
            return None
        return int(number) if self._count - len(self._events) <= int(number) <= self._count else None
