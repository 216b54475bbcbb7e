"""Stands before a real server and does to its requests what bad networks and bad servers do."""

import argparse
import http.client
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Request:
    """What the client asked."""

    method: str
    path: str
    body: bytes
    time_s: float


@dataclass(frozen=True)
class Fault:
    """What happens to one request. Without any of these it passes.

    Attributes:
        delay_s: before anything else.
        status: answered instead of asking the server, with `headers` and `text`.
        reset: the connection is reset instead of asking the server.
        lost: the server is asked, and its answer is lost with the connection.
        hang: no answer, until `FaultProxy.release`.
    """

    delay_s: float = 0.0
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    reset: bool = False
    lost: bool = False
    hang: bool = False


PASS = Fault()
RESET = Fault(reset=True)
LOST = Fault(lost=True)
HANG = Fault(hang=True)


class FaultProxy:
    """Listens on a port of its own. `plan` is asked about every request and may be replaced at any time."""

    def __init__(
        self,
        upstream_port: int,
        plan: Callable[[Request], Fault] = lambda request: PASS,
        address: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self.upstream_port = upstream_port
        self.plan = plan
        self.requests: list[tuple[Request, Fault]] = []
        self._released = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def _any(self) -> None:
                proxy._serve(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _any  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(address, Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def heal(self) -> None:
        """From now on everything passes, and what hangs is let go with a reset."""
        self.plan = lambda request: PASS
        self.release()

    def release(self) -> None:
        """Reset the connections that hang."""
        self._released.set()
        self._released = threading.Event()

    def close(self) -> None:
        """Stop listening."""
        self.release()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        request = Request(handler.command, handler.path, body, time.monotonic())
        fault = self.plan(request)
        self.requests.append((request, fault))
        time.sleep(fault.delay_s)
        if fault.hang:
            self._released.wait(600)
        if fault.hang or fault.reset:
            _reset(handler)
        elif fault.status:
            _answer(handler, fault.status, fault.headers, fault.text.encode())
        else:
            self._forward(handler, body, fault.lost)

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes, lost: bool) -> None:
        server = http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=120)
        try:
            headers = {key: value for key, value in handler.headers.items() if key.lower() != "connection"}
            server.request(handler.command, handler.path, body, headers)
            answer = server.getresponse()
            content = answer.read()
        except OSError:
            _reset(handler)
            return
        finally:
            server.close()
        if lost:
            _reset(handler)
            return
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "content-length")}
        _answer(handler, answer.status, kept, content)


def _answer(handler: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str], content: bytes) -> None:
    handler.send_response_only(status)
    for key, value in headers.items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)


def _reset(handler: BaseHTTPRequestHandler) -> None:
    """End the connection with a RST."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def main() -> None:
    """A process of its own that delays every request, by `UPSTREAM_PORT DELAY_S`, or refuses it; prints its port."""
    parser = argparse.ArgumentParser()
    parser.add_argument("upstream_port", type=int)
    parser.add_argument("delay_s", type=float)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--status", type=int, nargs="+", default=[0], help="answered by turns; 0: the server is asked")
    given = parser.parse_args()
    turns = itertools.cycle(given.status)
    proxy = FaultProxy(
        given.upstream_port,
        lambda request: Fault(delay_s=given.delay_s, status=next(turns)),
        (given.host, given.port),
    )
    print(proxy.port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
