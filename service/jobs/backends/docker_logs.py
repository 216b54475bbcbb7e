"""What containers have written: followed through the engine, and kept in the job's folder after they ended."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service.errors import StorageError
from service.jobs import plain_files

# Seconds between two chances for a follower to stop.
_BREATH_S = 1.0
# Pieces that wait for a slow reader; the engine waits with the rest.
_AHEAD = 64


def path(folder: Path, attempt: int, node: int | str) -> Path:
    """Where the log of a node is kept."""
    return folder / "attempts" / str(attempt) / f"log-node{node}.txt"


def keep(api: Any, container: str, folder: Path, name: str) -> None:
    """Copy what a container has written to a file below `folder`, whole or not at all.

    Raises StorageError, and what the engine's client raises.
    """
    target = folder / name
    pieces = api.logs(container, stream=True, follow=False)
    # What the engine's client raises is an OSError as well, and none of the file's.
    with contextlib.ExitStack() as stack:
        with _writing(target):
            file = stack.enter_context(plain_files.writing(folder, name))
        for piece in pieces:
            with _writing(target):
                file.write(piece)
        # A broken connection looks like the end of the log.
        api.ping()
        with _writing(target):
            stack.close()


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{target}: the log cannot be kept ({error.strerror}); free some space") from None


def follow(api: Any, container: str, tail: int | None, go_on: Callable[[], bool]) -> Iterator[bytes]:
    """What a container writes until it ends or `go_on()` says no; b"" after each second of silence.

    Raises what the engine's client raises. A thread reads, because the client's streams know no time limit.
    """
    stream = api.logs(container, stream=True, follow=True, tail="all" if tail is None else tail)
    pieces: queue.Queue[bytes | Exception | None] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(piece: bytes | Exception | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                pieces.put(piece, timeout=_BREATH_S)
                return

    def read() -> None:
        try:
            for piece in stream:
                put(piece)
                if stopped.is_set():
                    break
            put(None)
        except Exception as error:
            # Whatever it is, the reader has to hear of it.
            put(error)

    reader = threading.Thread(target=read, name=f"log of {container}", daemon=True)
    reader.start()
    try:
        while go_on():
            try:
                piece = pieces.get(timeout=_BREATH_S)
            except queue.Empty:
                yield b""
                continue
            if piece is None:
                return
            if isinstance(piece, Exception):
                raise piece
            yield piece
    finally:
        stopped.set()
        with contextlib.suppress(Exception):
            stream.close()
