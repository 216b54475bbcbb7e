"""What pods have written: read, followed over the pods that take one another's place, and kept in the job's folder."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from service import plain_files
from service.errors import BackendError, StorageError
from service.jobs.backends.kubernetes.cluster import Cluster
from service.jobs.backends.kubernetes.pods import Pod
from service.jobs.breathing import breathing
from service.jobs.manifests.pods import MAIN
from service.jobs.places import Place, Placed, PlaceLostError, Trail

# Seconds between two looks at what there is to follow.
_LOOK_S = 0.5
_PIECE = 64 << 10
_CLOCKS_S = 60
# Refusals in a row, after which a follower is told.
_PATIENCE = 3
_GAP = b"[the cluster has put away what it was asked for here: lines may be missing]\n"


def read(cluster: Cluster, pods: Sequence[Pod], tail: int | None = None) -> Iterator[bytes]:
    """What the pods of a node have written, the oldest first; of the newest alone if `tail` lines are asked for."""
    for pod in pods[-1:] if tail is not None else pods:
        if _has_begun(pod):
            yield from _pieces(cluster.log(pod.name, MAIN, tail=tail))


def follow(
    cluster: Cluster,
    pods: Callable[[], tuple[Sequence[Pod], bool]],
    go_on: Callable[[], bool],
    *,
    tail: int | None = None,
    since: Place | None = None,
) -> Iterator[bytes]:
    """What a node writes, `Placed` here and there, until it has ended or `go_on()` says no; b"" about every second of
    silence. A connection that breaks is made anew, and goes on where it was.

    Args:
        pods: of the node, the oldest first, and whether there may be more of them later.

    Raises:
        BackendError: the cluster does not answer.
        PlaceLostError: `since` is in no pod's log any more.
    """
    done: set[str] = set()
    lines: _Lines | None = None
    failures, has_read = 0, False
    while go_on():
        found, more = pods()
        # Not once one is read: another that takes its place is newer, and the rest of the first comes before it.
        if not has_read:
            done = {pod.name for pod in found[: _first(found, tail, since)]}
        pod = next((one for one in found if one.name not in done), None)
        if pod is None or not _has_begun(pod):
            if not more:
                return
            yield b""
            time.sleep(_LOOK_S)
            continue
        if lines is None or lines.pod != pod.name:
            lines = _Lines(pod.name, None if has_read else tail, None if has_read else since)
        try:
            response = lines.open(cluster)
        except BackendError:
            # It may have gone since it was listed.
            failures += 1
            if failures == _PATIENCE:
                raise
            yield b""
            time.sleep(_LOOK_S)
            continue
        failures, has_read = 0, True
        came_whole = threading.Event()
        # A response that ran into a time limit could not be read on.
        for piece in breathing(
            _ahead(response, came_whole), go_on, [response.shutdown, response.close], "log of a pod"
        ):
            yield from lines.take(piece) if piece else (b"",)
        if pod.has_ended and came_whole.is_set():
            yield lines.rest()
            done.add(pod.name)
        else:
            # The connection may have broken, within a line: what is missing is asked for until the pod has ended.
            time.sleep(_LOOK_S)


def keep(cluster: Cluster, pods: Sequence[Pod], folder: Path, name: str) -> None:
    """Copy what the pods of a node have written to a file below `folder`, whole or not at all.

    Raises:
        BackendError: the cluster does not answer.
        StorageError: the file cannot be written.
    """
    try:
        with plain_files.writing(folder, name) as file:
            for piece in read(cluster, pods):
                file.write(piece)
    except OSError as error:
        raise StorageError(f"{folder / name}: the log cannot be kept ({error.strerror}); free some space") from None


def _has_begun(pod: Pod) -> bool:
    return bool(pod.started_s) or pod.is_at_work


def _pieces(response: Any) -> Generator[bytes]:
    from urllib3.exceptions import HTTPError

    try:
        yield from response.stream(_PIECE)
    except HTTPError as error:
        raise BackendError(f"the cluster broke off a log ({error}); ask again") from None
    finally:
        response.close()


def _ahead(response: Any, came_whole: threading.Event) -> Iterator[bytes]:
    """The pieces of a response that goes on. However it ends, the follower looks at the pod whether that was all."""
    with contextlib.suppress(Exception):
        yield from response.stream(_PIECE)
        came_whole.set()


def _first(pods: Sequence[Pod], tail: int | None, since: Place | None) -> int:
    """Which of a node's pods is to be read first; raises PlaceLostError."""
    if since is None:
        return 0 if tail is None else max(0, len(pods) - 1)
    found = next((number for number, pod in enumerate(pods) if since.is_of(pod.name)), None)
    if found is None:
        raise PlaceLostError("the pod that wrote this is gone, and its log with it")
    return found


class _Lines:
    """The lines of one pod, whole and once, over all connections to it."""

    def __init__(self, pod: str, tail: int | None, since: Place | None) -> None:
        self.pod = pod
        self._tail = tail
        self._trail = Trail(pod, is_whole=tail is None and since is None, since=since)
        self._left = b""
        self._notice = b""

    def open(self, cluster: Cluster) -> Any:
        """A response that goes on where the one before it has ended; raises BackendError, PlaceLostError."""
        self._left = b""
        self._trail.rewind()
        asked: dict[str, Any] = {"timed": True, "tail": self._tail}
        if (place := self._trail.place) is not None:
            asked = {"timed": True, "since_s": max(1, math.ceil(time.time() - place.since_s) + _CLOCKS_S)}
            try:
                # Followed, a log says nothing of where it stands: a place that is gone would be waited for.
                with contextlib.closing(_pieces(cluster.log(self.pod, MAIN, **asked))) as pieces:
                    place.find(_split(pieces))
            except PlaceLostError:
                if not self._trail.has_begun:
                    raise
                self._trail.give_up()
                self._tail, self._notice, asked = None, _GAP, {"timed": True}
        return cluster.log(self.pod, MAIN, **asked, follow=True)

    def take(self, piece: bytes) -> Iterator[bytes]:
        """The whole lines that came with a piece."""
        *lines, self._left = (self._left + piece).split(b"\n")
        told, self._notice = self._notice, b""
        for line in lines:
            content = self._trail.take(line + b"\n")
            if isinstance(content, Placed):
                # Without an empty piece, which would say that there is nothing just now.
                yield from (told, content) if told else (content,)
                told = b""
            else:
                told += content
        if told:
            yield told

    def rest(self) -> bytes:
        """A last line without an end."""
        left, self._left = self._left, b""
        return self._trail.take(left) if left else b""


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Their lines."""
    left = b""
    for piece in pieces:
        *lines, left = (left + piece).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if left:
        yield left
