"""Work that is killed (SIGKILL) at each of its calls that change files: what every such death leaves behind."""

import builtins
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CHANGES = (
    *("write", "pwrite", "fsync", "truncate", "ftruncate", "replace", "rename", "link", "unlink", "remove"),
    *("mkdir", "rmdir", "chmod"),
)
_PATIENCE_S = 300
_Sizes = dict[int, int]


def after_each_kill(
    folder: Path, prepare: Callable[[Path], Any], work: Callable[[Path], Any], *, power: bool = False
) -> Iterator[Path]:
    """Do the work in a fresh place each time, and kill it one call later than the time before.

    That is before each call that changes files, and after each that opens one to write, which is still empty then.

    Args:
        folder: gets the places.
        prepare: fills a place, which is made for it, with what there is before the work.
        power: the machine loses it, too: what was written and not synced is gone, and the names of files stay.

    Yields:
        The place, as the killed process has left it; the last one is as it is when nobody kills.
    """
    number, code = 0, -1
    while code:
        number += 1
        place = folder / f"killed-{number}"
        place.mkdir(parents=True)
        prepare(place)
        before = _sizes(place)
        code, synced = _ended(number, lambda place=place: work(place))
        assert code in (0, -signal.SIGKILL), f"step {number}: the work itself ended with {code}"
        if power:
            _lose(place, before | synced)
        yield place
    assert number > 1, "nothing was done that counts"


def _ended(number: int, work: Callable[[], Any]) -> tuple[int, _Sizes]:
    """The exit code of a process that does the work and is killed at this call, from 1 on, and what it has synced."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        # A fork of a process with threads may find a lock that nobody will open.
        signal.alarm(_PATIENCE_S)
        try:
            _kill_at(number, writing)
            work()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading) as told:
        synced = {int(inode): int(size) for inode, size in (line.split() for line in told)}
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), synced


def _kill_at(number: int, told: int) -> None:
    """From now on count this process's calls, and write down what it syncs."""
    left, write, fsync, open_file, open_descriptor = number, os.write, os.fsync, io.open, os.open

    def count() -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            count()
            return call(*arguments, **named)

        return counting

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        about = os.fstat(descriptor)
        write(told, f"{about.st_ino} {about.st_size}\n".encode())

    def opened(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        found = open_file(file, mode, *arguments, **named)
        if set(mode) & set("wax+"):
            count()
        return found

    def described(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        found = open_descriptor(path, flags, *arguments, **named)
        if flags & (os.O_WRONLY | os.O_RDWR):
            count()
        return found

    os.fsync, os.open, io.open, builtins.open = synced, described, opened, opened
    for name in _CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    subprocess.Popen._execute_child = counted(subprocess.Popen._execute_child)  # type: ignore[attr-defined,method-assign]


def _sizes(place: Path) -> _Sizes:
    """Bytes of each file, by inode."""
    return {(about := path.stat()).st_ino: about.st_size for path in place.rglob("*") if path.is_file()}


def _lose(place: Path, kept: _Sizes) -> None:
    for path in place.rglob("*"):
        if path.is_file() and path.stat().st_size > kept.get(path.stat().st_ino, 0):
            os.truncate(path, kept.get(path.stat().st_ino, 0))
