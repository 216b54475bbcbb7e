"""A stream that blocks, read such that whoever reads can stop: a thread reads ahead, silence is told each second."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator

# Seconds between two chances for a reader to stop.
_BREATH_S = 1.0
# Pieces that wait for a slow reader; the source waits with the rest.
_AHEAD = 64


def breathing(
    pieces: Iterable[bytes], go_on: Callable[[], bool], closes: Iterable[Callable[[], object]], name: str
) -> Iterator[bytes]:
    """The pieces until their end, or until `go_on()` says no; b"" after each second of silence. Raises what they raise.

    Args:
        closes: called at the end, in turn, whatever they raise: one of them lets go of who still waits for a piece.
        name: of the thread.
    """
    ahead: queue.Queue[bytes | Exception | None] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(piece: bytes | Exception | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ahead.put(piece, timeout=_BREATH_S)
                return

    def read() -> None:
        try:
            for piece in pieces:
                put(piece)
                if stopped.is_set():
                    break
            put(None)
        except Exception as error:
            # Whatever it is, the reader has to hear of it.
            put(error)

    threading.Thread(target=read, name=name, daemon=True).start()
    try:
        while go_on():
            try:
                piece = ahead.get(timeout=_BREATH_S)
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
        for close in closes:
            with contextlib.suppress(Exception):
                close()
