"""Answers that do not end by themselves: how many there may be, and that each gives its place back."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import cast

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.api import sse
from service.api.faults import TooManyRequestsError
from service.api.meters import Meters
from service.errors import LorotError

_WAIT_S = 10.0


class Streams:
    """The places for event streams. Used in the event loop alone.

    Args:
        most: of all clients together.
        most_each: of one of them, so that nobody takes the others' places; None: five of six.
    """

    def __init__(self, most: int, most_each: int | None, meters: Meters) -> None:
        self._most = most
        self._most_each = most_each or max(1, most * 5 // 6)
        self._meters = meters
        self._held: Counter[str] = Counter()

    def answer(self, events: AsyncIterator[bytes], client: str, check: Callable[[], object]) -> "EventStream":
        """These events as an answer.

        Args:
            client: whose place it takes, as `Access.client_of` says.
            check: raises a LorotError once whoever listens may not any more; asked about every 15 s, and ends it.

        Raises:
            TooManyRequestsError: no place is left.
        """
        if self._meters.streams >= self._most:
            raise TooManyRequestsError(f"{self._most} event streams are open already, which is the most here", _WAIT_S)
        if self._held[client] >= self._most_each:
            raise TooManyRequestsError(
                f"{self._most_each} event streams of yours are open already, which is the most of one client", _WAIT_S
            )
        self._meters.streams += 1
        self._held[client] += 1
        return EventStream(_while_allowed(events, check), lambda: self._give_back(client))

    def _give_back(self, client: str) -> None:
        self._meters.streams -= 1
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]


async def _while_allowed(events: AsyncIterator[bytes], check: Callable[[], object]) -> AsyncIterator[bytes]:
    clock = asyncio.get_running_loop().time
    asked_s = clock()
    try:
        async for event in events:
            # Something comes at each keepalive at the latest.
            if clock() - asked_s >= sse.KEEPALIVE_S:
                try:
                    check()
                except LorotError:
                    return
                asked_s = clock()
            yield event
    finally:
        await cast(AsyncGenerator[bytes, None], events).aclose()


class EventStream(StreamingResponse):
    """Server-sent events as they come, until either end has had enough."""

    media_type = sse.MEDIA_TYPE

    def __init__(self, events: AsyncIterator[bytes], give_back: Callable[[], None]) -> None:
        super().__init__(events, headers=sse.HEADERS)
        self._give_back = give_back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._give_back()
            # What it has open is closed now, not when the garbage is collected.
            await cast(AsyncGenerator[bytes, None], self.body_iterator).aclose()
