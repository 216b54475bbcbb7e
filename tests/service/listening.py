"""A service's app on a port, in a thread of the test's own process."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI


@contextlib.contextmanager
def listening(app: FastAPI, port: int = 0, *, in_order: bool = True) -> Iterator[str]:
    """Its address.

    Args:
        port: 0 for a free one.
        in_order: at the end, answers that are under way are waited for; else they break off, as of one that is killed.
    """
    place = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.force_exit = not in_order
        server.should_exit = True
        thread.join()
