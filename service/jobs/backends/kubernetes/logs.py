"""What pods have written: read, followed over the pods that take one another's place, and kept in the job's folder."""

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service import plain_files
from service.errors import BackendError, StorageError
from service.jobs.backends.kubernetes.cluster import Cluster
from service.jobs.backends.kubernetes.pods import Pod
from service.jobs.breathing import breathing
from service.jobs.manifests.pods import MAIN

# Seconds between two looks at what there is to follow.
_LOOK_S = 0.5
_PIECE = 64 << 10
_CLOCKS_S = 60
# Refusals in a row, after which a follower is told.
_PATIENCE = 3
# 2026-01-01T00:00:00.12Z, the way the kubelet puts it before each line: without the zeros at the end.
_TIME = re.compile(rb"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z ")


def read(cluster: Cluster, pods: Sequence[Pod], tail: int | None = None) -> Iterator[bytes]:
    """What the pods of a node have written, the oldest first; of the newest alone if `tail` lines are asked for."""
    for pod in pods[-1:] if tail is not None else pods:
        if _has_begun(pod):
            yield from _pieces(cluster.log(pod.name, MAIN, tail=tail))


def follow(
    cluster: Cluster,
    pods: Callable[[], tuple[Sequence[Pod], bool]],
    tail: int | None,
    go_on: Callable[[], bool],
) -> Iterator[bytes]:
    """What a node writes, until it has ended or `go_on()` says no; b"" about every second of silence.

    A connection that breaks is made anew, and goes on after the last line that came.

    Args:
        pods: of the node, the oldest first, and whether there may be more of them later.
    """
    done: set[str] = set()
    lines, failures, has_read = _Lines(), 0, False
    while go_on():
        found, more = pods()
        # Not once one is read: another that takes its place is newer, and the rest of the first comes before it.
        if tail is not None and not has_read:
            done = {pod.name for pod in found[:-1]}
        pod = next((one for one in found if one.name not in done), None)
        if pod is None or not _has_begun(pod):
            if not more:
                return
            yield b""
            time.sleep(_LOOK_S)
            continue
        since_s = lines.since_s()
        try:
            response = cluster.log(pod.name, MAIN, tail=tail if since_s is None else None, since_s=since_s, follow=True)
        except BackendError:
            # It may have gone since it was listed.
            failures += 1
            if failures == _PATIENCE:
                raise
            yield b""
            time.sleep(_LOOK_S)
            continue
        failures, has_read = 0, True
        # A response that ran into a time limit could not be read on.
        for piece in breathing(_ahead(response), go_on, [response.shutdown, response.close], "log of a pod"):
            yield lines.take(piece) if piece else b""
        if pod.has_ended:
            yield lines.rest()
            done.add(pod.name)
            lines, tail = _Lines(), None
        else:
            # The connection may have broken, within a line: what is missing is asked for until the pod has ended.
            lines.forget_rest()
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


def _pieces(response: Any) -> Iterator[bytes]:
    from urllib3.exceptions import HTTPError

    try:
        yield from response.stream(_PIECE)
    except HTTPError as error:
        raise BackendError(f"the cluster broke off a log ({error}); ask again") from None
    finally:
        response.close()


def _ahead(response: Any) -> Iterator[bytes]:
    """The pieces of a response that goes on. However it ends, the follower looks at the pod whether that was all."""
    with contextlib.suppress(Exception):
        yield from response.stream(_PIECE)


class _Lines:
    """Takes the times off the lines of one pod, and drops lines that came before."""

    def __init__(self) -> None:
        self._left = b""
        self._last: tuple[bytes, bytes] | None = None

    def take(self, piece: bytes) -> bytes:
        """The whole lines that came with a piece."""
        *lines, self._left = (self._left + piece).split(b"\n")
        return b"".join(self._line(line + b"\n") for line in lines)

    def rest(self) -> bytes:
        """A last line without an end."""
        left, self._left = self._left, b""
        return self._line(left) if left else b""

    def forget_rest(self) -> None:
        """The next piece begins a line."""
        self._left = b""

    def since_s(self) -> int | None:
        """How long ago the last line was written, with a minute for clocks that differ; None before the first."""
        if self._last is None:
            return None
        written_s = datetime.fromisoformat(self._last[0].decode()).replace(tzinfo=UTC).timestamp()
        return max(1, math.ceil(time.time() - written_s) + _CLOCKS_S)

    def _line(self, line: bytes) -> bytes:
        found = _TIME.match(line)
        if found is None:
            return line
        # Fractions without their last zeros compare as text does.
        written = (found[1], found[2] or b"")
        if self._last is not None and written <= self._last:
            return b""
        self._last = written
        return line[found.end() :]
