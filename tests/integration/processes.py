"""Real jobs from outside: waiting for what they do, and finding their processes."""

import contextlib
import time
from collections.abc import Callable

import psutil

# A busy machine than two idle cores.
_SLOWER = 4


def await_(condition: Callable[[], object], what: str, seconds: float, told: Callable[[], str] = str) -> float:
    """Wait until it holds; returns when that was. Fails after a while with `what`, and what `told` finds then.

    Args:
        seconds: that it may take on two idle cores.
    """
    left, last = seconds * _SLOWER, time.monotonic()
    while not condition():
        assert left > 0, f"not within {seconds * _SLOWER:.0f} s: {what}\n{told()}"
        time.sleep(0.05)
        now = time.monotonic()
        # A machine that stood still gave nobody time.
        left, last = left - min(now - last, 1.0), now
    return time.monotonic()


def family(pid: int) -> list[psutil.Process]:
    """A launcher, torchrun and all below it, as far as they have come to life."""
    try:
        launcher = psutil.Process(pid)
        return [launcher, *launcher.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def workers(pid: int) -> dict[int, psutil.Process]:
    """The training workers below a process, by rank: children of torchrun, which bears their name too."""
    found = {}
    for process in family(pid)[1:]:
        # Some are gone by the time they are looked at.
        with contextlib.suppress(psutil.NoSuchProcess, AttributeError):
            if "torch.distributed.run" in process.parent().cmdline():  # type: ignore[union-attr]
                found[int(process.environ()["RANK"])] = process
    return found


def lives(process: psutil.Process) -> bool:
    """Whether it does anything: nobody may have looked after a dead one."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
