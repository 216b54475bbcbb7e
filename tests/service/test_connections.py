"""What clients may keep a connection open without: how long each wait is, and when it ends. No test waits itself."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from service.api import server

# uvicorn's, apart from the service's own.
KEEP_ALIVE_S = 5
_NEVER_S = 1e6
_PIECE = b"x" * 4096

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CUT = b"GET / HTTP/1.1\r\nHost: "
# Of its body, none.
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"


class Clock(asyncio.SelectorEventLoop):
    """A loop on which time goes by when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self._waits: list[tuple[float, asyncio.TimerHandle, Callable[[], object]]] = []

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = super().call_later(_NEVER_S, callback, *args, context=context)
        self._waits.append((delay, handle, lambda: callback(*args)))
        return handle

    def waits(self) -> list[float]:
        """What is waited for, seconds."""
        return sorted(delay for delay, handle, _ in self._waits if not handle.cancelled())

    async def over(self, delay: float) -> None:
        """This wait has been in vain."""
        for waited, handle, call in self._waits:
            if waited == delay and not handle.cancelled():
                handle.cancel()
                call()
        # A connection ends at the next turn, its requests at the one after.
        for _ in range(5):
            await asyncio.sleep(0)


class Connection:
    """One client, and what the service has of it.

    Attributes:
        ends: how many of its requests were heard to the end, with an answer or not.
    """

    def __init__(self, clock: Clock, answer: Callable[[Any, "Connection"], Coroutine[Any, Any, None]]) -> None:
        self.clock = clock
        self.ends = 0
        self.go_on = asyncio.Event()
        self._answer = answer
        self._state = ServerState()

    async def begin(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            try:
                await self._answer(send, self)
            finally:
                self.ends += 1

        config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_keep_alive=KEEP_ALIVE_S)
        config.load()
        ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        _, self.protocol = await self.clock.connect_accepted_socket(
            lambda: server.Timed(config, self._state, {}, self.clock), ours
        )

    def send(self, data: bytes) -> None:
        self.protocol.data_received(data)

    async def taken(self, count: int = 1 << 16) -> bytes:
        """What the client reads now; empty at the end."""
        return await self.clock.sock_recv(self.theirs, count)

    @property
    def is_open(self) -> bool:
        return bool(self._state.connections)


async def short(send: Any, connection: Connection) -> None:
    """An answer at once, without a look at the body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def late(send: Any, connection: Connection) -> None:
    """An answer when the test wants it."""
    await connection.go_on.wait()
    await short(send, connection)


async def long(send: Any, connection: Connection) -> None:
    """Far more than the client's side has room for."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(5000):
        await send({"type": "http.response.body", "body": _PIECE, "more_body": True})


async def left_over(send: Any, connection: Connection) -> None:
    """A little more than the client's side has room for, and no more."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    transport = connection.protocol.transport
    while not transport.get_write_buffer_size():
        await send({"type": "http.response.body", "body": _PIECE, "more_body": True})
    connection.go_on.set()
    await send({"type": "http.response.body", "body": b""})


def tried(
    answer: Callable[[Any, Connection], Coroutine[Any, Any, None]],
    test: Callable[[Clock, Connection], Coroutine[Any, Any, None]],
) -> None:
    """Run a test of one connection, on which requests are answered so."""

    @contextlib.asynccontextmanager
    async def opened(clock: Clock) -> AsyncIterator[Connection]:
        connection = Connection(clock, answer)
        await connection.begin()
        try:
            yield connection
        finally:
            connection.protocol.transport.abort()
            connection.theirs.close()
            await clock.over(-1)

    async def run() -> None:
        clock = asyncio.get_running_loop()
        assert isinstance(clock, Clock)
        async with asyncio.timeout(60), opened(clock) as connection:
            await test(clock, connection)

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(run())


def test_connections_on_which_no_request_comes_are_let_go_of() -> None:
    async def nothing(clock: Clock, connection: Connection) -> None:
        assert clock.waits() == [server.HEAD_S]
        await clock.over(server.HEAD_S)
        assert await connection.taken() == b""

    async def cut(clock: Clock, connection: Connection) -> None:
        begun = connection.protocol._late
        for byte in CUT:
            connection.send(bytes([byte]))
        assert connection.protocol._late is begun, "a byte now and then gains no time"
        assert clock.waits() == [server.HEAD_S]
        await clock.over(server.HEAD_S)
        assert await connection.taken() == b""

    async def then_cut(clock: Clock, connection: Connection) -> None:
        connection.send(GET)
        assert clock.waits() == [], "an answer may take longer than a request"
        connection.go_on.set()
        assert (await connection.taken()).startswith(b"HTTP/1.1 200")
        assert clock.waits() == [KEEP_ALIVE_S]
        connection.send(CUT)
        assert clock.waits() == [server.HEAD_S]
        await clock.over(server.HEAD_S)
        assert await connection.taken() == b""

    for test in (nothing, cut, then_cut):
        tried(late, test)


def test_of_a_request_that_was_answered_early_the_body_may_come_but_not_for_ever() -> None:
    async def answered(clock: Clock, connection: Connection) -> None:
        connection.send(POST)
        assert (await connection.taken()).startswith(b"HTTP/1.1 200")
        assert clock.waits() == [KEEP_ALIVE_S]
        connection.send(b"abc")
        assert clock.waits() == [server.HEAD_S]

    async def cut(clock: Clock, connection: Connection) -> None:
        await answered(clock, connection)
        await clock.over(server.HEAD_S)
        assert await connection.taken() == b""

    async def whole(clock: Clock, connection: Connection) -> None:
        await answered(clock, connection)
        connection.send(b"defghi")
        assert clock.waits() == [KEEP_ALIVE_S], "it is idle, as after any other answer"
        connection.send(GET)
        assert clock.waits() == []
        assert (await connection.taken()).startswith(b"HTTP/1.1 200")
        await clock.over(KEEP_ALIVE_S)
        assert await connection.taken() == b""

    async def with_the_next(clock: Clock, connection: Connection) -> None:
        await answered(clock, connection)
        begun = connection.protocol._late
        connection.send(b"defghi" + CUT)
        assert clock.waits() == [server.HEAD_S]
        assert connection.protocol._late is not begun, "the next request has time of its own"

    for test in (cut, whole, with_the_next):
        tried(short, test)


def test_what_is_sent_has_to_be_taken() -> None:
    async def never(clock: Clock, connection: Connection) -> None:
        connection.send(GET * 20)
        while not clock.waits():
            await asyncio.sleep(0)
        assert clock.waits() == [server.WRITE_S]
        assert (connection.is_open, connection.ends) == (True, 0)
        await clock.over(server.WRITE_S)
        assert (connection.is_open, connection.ends) == (False, 1)
        assert clock.waits() == []

    async def slowly(clock: Clock, connection: Connection) -> None:
        connection.send(GET)
        for _ in range(3):
            while not clock.waits():
                await asyncio.sleep(0)
            assert clock.waits() == [server.WRITE_S], "what was waited for before was taken"
            first = connection.protocol._stuck
            while connection.protocol._stuck is first:
                assert await connection.taken()
        assert connection.is_open

    async def gone(clock: Clock, connection: Connection) -> None:
        connection.send(GET)
        while not clock.waits():
            await asyncio.sleep(0)
        connection.theirs.close()
        while connection.is_open:
            await asyncio.sleep(0)
        assert clock.waits() == []

    for test in (never, slowly, gone):
        tried(long, test)


def test_a_little_that_nobody_takes_keeps_no_connection_either() -> None:
    async def test(clock: Clock, connection: Connection) -> None:
        connection.send(GET)
        await connection.go_on.wait()
        assert clock.waits() == [server.WRITE_S]
        connection.protocol.transport.close()
        for _ in range(5):
            await asyncio.sleep(0)
        assert connection.is_open, "asyncio would send the rest"
        await clock.over(server.WRITE_S)
        assert not connection.is_open

    tried(left_over, test)
