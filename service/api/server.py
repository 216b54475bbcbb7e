"""`lorot serve`: one process with the record, the controller, the API and the console, and its orderly end."""

import asyncio
import contextlib
import ctypes
import gc
import importlib
import socket
import sys
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.api import app as application
from service.api import server_note, structured_log
from service.api.access import Access
from service.errors import BackendError
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.settings import ServiceSettings

# From a request to end to the end of what is still answered.
_GRACE_S = 10
# For the head of a request to come, once it is awaited.
HEAD_S = 30.0
# For what is sent to be taken.
WRITE_S = 60.0
# As in malloc.h.
_M_ARENA_MAX = -8


class Timed(H11Protocol):
    """A connection that is let go of if its client does not go on in time.

    That is, if the head of a request does not come, the body of one that was answered does not end, or what is sent is
    not taken. Others would wait for it for ever, until no file can be opened any more.
    """

    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Nothing is left over without `pause_writing`: even to be closed, a connection waits until that is taken.
        transport.set_write_buffer_limits(0)
        self._late = self.loop.call_later(HEAD_S, transport.close)

    def data_received(self, data: bytes) -> None:
        was_idle = self.conn.their_state is h11.IDLE
        super().data_received(data)
        is_idle = self.conn.their_state is h11.IDLE
        if not was_idle and is_idle:
            # Of a request that was answered before, the body has now come.
            self._in_time()
        if is_idle and not self.conn.trailing_data[0]:
            # uvicorn waits for the next one from an answer on, and no longer once anything comes after that.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        elif not is_idle and self.conn.our_state is not h11.DONE:
            self._in_time()
        elif self._late is None:
            # A further request has begun, or of one that was answered the body still comes.
            self._late = self.loop.call_later(HEAD_S, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        self._taken()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _taken(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None


class _Server(uvicorn.Server):
    """Ends event streams before it waits for the answers that are under way; a second signal waits for nothing."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not to be raised again at the end, which would make a failure of an orderly end.
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        inner = self.config.app
        assert isinstance(inner, FastAPI)
        application.begin_to_close(inner)
        await super().shutdown(sockets)


def serve(
    settings: ServiceSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    mount: Callable[[FastAPI], None] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Jobs go on afterwards, and are taken over by the next service.

    Args:
        port: 0 for a free one.
        mount: adds the console's pages.
        say: is told where it listens, once it does.

    Raises:
        ConfigError: off loopback without a token; another service has this record (TakenError).
        TrackingError: MLflow does not answer.
        BackendError: the port is taken.
        StorageError: the state's folder cannot be written.
    """
    _lighten()
    access = Access(settings, host=host)
    access.check_start()
    listening = _listen(host, port)
    with contextlib.closing(listening):
        desk = Desk(settings)
        controller = Controller(desk)
        app = application.create(desk, controller, access)
        if mount is not None:
            mount(app)
        structured_log.start()
        controller.on_read.append(_set_aside)
        controller.start()
        _set_aside()
        try:
            url = _url(host, listening.getsockname()[1])
            with server_note.kept(settings, url):
                say(f"lorot serves at {url}")
                _server(app, settings).run(sockets=[listening])
        finally:
            controller.stop()


def _lighten() -> None:
    """Settle for less memory and shorter turns, before MLflow is imported and threads are there."""
    if "pyarrow" not in sys.modules:
        # MLflow imports pandas, if that is there, which would load Arrow: 37 MB, for nothing.
        sys.modules["pyarrow"] = None  # type: ignore[assignment]
        with contextlib.suppress(ImportError):
            importlib.import_module("pandas")
        del sys.modules["pyarrow"]
    # Threads that write to MLflow would have answers wait 5 ms at every turn.
    sys.setswitchinterval(0.001)
    with contextlib.suppress(AttributeError, OSError):
        # glibc keeps freed memory for each thread that has ever run beside others.
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def _set_aside() -> None:
    """What there is now stays: the collector would go through it again and again while answers wait."""
    gc.collect()
    gc.freeze()


def _server(app: FastAPI, settings: ServiceSettings) -> _Server:
    config = uvicorn.Config(
        app,
        http=Timed,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies),
        lifespan="on",
    )
    return _Server(config)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Named, or asyncio does not know it for TCP, and each answer waits 40 ms for its second packet.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise BackendError(f"{host}: is no address of this machine ({error.strerror or error})") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise BackendError(
            f"{host}:{port}: cannot be listened on ({error.strerror or error}); --port 0 takes a free one"
        ) from None
    return listening


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
