"""Which checkpoints stay. Nothing goes before as many as are to stay have been found sound."""

import logging
import os
import shutil
from pathlib import Path

from service.errors import CheckpointError
from service.training import checkpoint
from service.training.checkpoint import Checkpoint

_log = logging.getLogger(__name__)


class Retention:
    """Keeps the newest `keep_last` sound checkpoints of a folder, and the one with the best `metric` besides.

    One that was written a moment ago was hashed on its way and is taken to be sound. Any other is read back once, byte
    by byte, before one that it replaces goes; after that a change of size, time or inode makes it read again.

    Args:
        keep_last: at least 1.
        metric, mode: which metric tells the best one, and whether "max" or "min" is better.
    """

    def __init__(self, keep_last: int, metric: str, mode: str) -> None:
        assert keep_last >= 1
        self._keep_last = keep_last
        self._metric = metric
        self._sign = 1 if mode == "max" else -1
        self._sound: dict[Path, tuple[tuple[int, ...], ...]] = {}

    def written(self, one: Checkpoint) -> None:
        """This one has just been written."""
        self._sound[one.path] = _marks(one)

    def prune(self, folder: Path, newest_step: int | None = None) -> list[Path]:
        """Delete what is older than those that are kept; returns what was deleted.

        Damaged ones do not count, and stay until enough newer ones are sound; one whose index cannot be read stays for
        a person to look at. So does what lies beyond `newest_step`, the last one this run has written: an earlier
        attempt left it, resume passed over it, and it must not take a sound one's place.
        """
        readable = []
        for path in checkpoint.find(folder):
            try:
                one = checkpoint.read(path)
            except CheckpointError:
                continue
            if newest_step is None or one.step <= newest_step:
                readable.append(one)
        kept: set[Path] = set()
        left = list(readable)
        while left and len(kept) < self._keep_last:
            one = left.pop(0)
            if self._is_sound(one):
                kept.add(one.path)
        # With fewer sound ones than that, none is left over here.
        by_value = [one for one in readable if self._metric in one.metrics]
        for one in sorted(by_value, key=lambda one: (self._sign * one.metrics[self._metric], one.step), reverse=True):
            if one.path in kept or self._is_sound(one):
                kept.add(one.path)
                break
        deleted = [one.path for one in left if one.path not in kept and _delete(one.path)]
        self._sound = {path: marks for path, marks in self._sound.items() if path not in deleted}
        return deleted

    def _is_sound(self, one: Checkpoint) -> bool:
        if self._sound.get(one.path) == _marks(one):
            return True
        try:
            marks = _marks(one)
            one.verify()
        except CheckpointError as error:
            _log.warning("does not count as kept: %s", error)
            return False
        self._sound[one.path] = marks
        return True


def _marks(one: Checkpoint) -> tuple[tuple[int, ...], ...]:
    """(bytes, time of the last change in ns, inode) of every file; (-1,) of one that is not there."""
    found: list[tuple[int, ...]] = []
    for name in one.files:
        try:
            state = os.stat(one.path / name)
        except OSError:
            found.append((-1,))
        else:
            found.append((state.st_size, state.st_mtime_ns, state.st_ino))
    return tuple(found)


def _delete(path: Path) -> bool:
    """Under a name that is no checkpoint's from the first moment on, however far the deleting comes."""
    leaving = checkpoint.beside(path, "leaving")
    shutil.rmtree(leaving, ignore_errors=True)
    try:
        path.rename(leaving)
    except OSError:
        return False
    shutil.rmtree(leaving, ignore_errors=True)
    return True
