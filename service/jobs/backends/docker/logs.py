"""What containers have written: followed through the engine, and kept in the job's folder after they ended."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service import plain_files
from service.errors import StorageError
from service.jobs.breathing import breathing
from service.jobs.places import Place, PlaceLostError, Trail


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


def follow(
    api: Any, container: str, go_on: Callable[[], bool], *, tail: int | None = None, since: Place | None = None
) -> Iterator[bytes]:
    """What a container writes until it ends or `go_on()` says no; b"" after each second of silence.

    Its last lines, or those from a place on, are `Placed` here and there.

    Raises PlaceLostError, and what the engine's client raises. A thread reads, because the client's streams know no
    time limit.
    """
    asked: dict[str, Any] = {"tail": "all" if tail is None else tail}
    if since is not None:
        if not since.is_of(container):
            raise PlaceLostError("another container wrote that")
        asked = {"since": since.since_s}
        # Followed, a log says nothing of where it stands: a place that is gone would be waited for.
        known = api.logs(container, stream=True, follow=False, timestamps=True, **asked)
        try:
            since.find(known)
        finally:
            known.close()
    with_times = tail is not None or since is not None
    stream = api.logs(container, stream=True, follow=True, timestamps=with_times, **asked)
    trail = Trail(container, since=since)
    # The client gives each of the engine's entries, which begins with its time, as a piece.
    for piece in breathing(stream, go_on, [stream.close], f"log of {container}"):
        yield trail.take(piece) if piece and with_times else piece
