"""A command and its children, run to its end: who passes signals on, and kills what does not end. Imports no torch."""

import contextlib
import math
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

import psutil

from service.jobs.process_family import signal_family
from service.jobs.stillness import Stillness

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# What this process takes for itself of the time that a signal leaves: whoever sent it may kill at its end.
OWN_S = 1.0
# How often a job is looked at.
_LOOK_S = 0.5


@dataclass
class Signals:
    """Which signals have come, and the torchrun that hears of the first; None before it starts and after its end."""

    grace_s: float
    received: list[int] = field(default_factory=list)
    child: subprocess.Popen[bytes] | None = None
    first_s: float = math.inf

    @property
    def left_s(self) -> float:
        """Seconds until all is to be over; without an end before the first signal."""
        return self.first_s + self.grace_s - time.monotonic()

    def hear(self, number: int, _frame: FrameType | None) -> None:
        again = number in self.received
        self.first_s = min(self.first_s, time.monotonic())
        self.received.append(number)
        if self.child is not None:
            if number == signal.SIGINT and again:
                _stop(self.child.pid, signal.SIGKILL)
            elif len(self.received) == 1:
                # Once: torchrun leaves its workers behind at the third, and they heed the first only.
                _stop(self.child.pid, number)


@contextlib.contextmanager
def passing_on(grace_s: float) -> Iterator[Signals]:
    """Hear the signals that a job is stopped with; afterwards they mean what they did before."""
    signals = Signals(grace_s)
    # nohup has SIGHUP ignored, and that is to last.
    heeded = [n for n in PASSED_ON if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, signals.hear) for number in heeded}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(
    line: list[str],
    env: Mapping[str, str],
    log: IO[bytes],
    lock: int,
    signals: Signals,
    still: Stillness,
    over: Callable[[], bool] | None = None,
) -> tuple[int, int]:
    """Run `line` to its end; returns its exit code and the first signal that asked this process to stop, or 0.

    Args:
        log: where it writes its errors.
        lock: a descriptor that it keeps open.
        still: who ends its workers if they stand still.
        over: asked now and then whether to end it.
    """
    # A session of its own: Ctrl-C in a terminal reaches the workers once, through torchrun, not twice.
    child = subprocess.Popen(
        line, env=env, stdin=subprocess.DEVNULL, stderr=log, pass_fds=(lock,), start_new_session=True
    )
    signals.child = child
    if signals.received:
        _stop(child.pid, signals.received[0])
    with still.watching(child.pid):
        _await(child, over, signals)
    # From here on its number may be another process's.
    signals.child = None
    return child.returncode, signals.received[0] if signals.received else 0


def _await(child: subprocess.Popen[bytes], over: Callable[[], bool] | None, signals: Signals) -> None:
    """Wait for the end of the child: it is asked to end when the job is over.

    It is killed when the time that a signal leaves is over, its own or this one: torchrun heeds none while it waits for
    other machines at the job's end, which may take five minutes.
    """
    until_s = math.inf
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_LOOK_S)
            return
        if min(signals.left_s, until_s - time.monotonic()) < OWN_S:
            _stop(child.pid, signal.SIGKILL)
        elif over is not None and over():
            _stop(child.pid, signal.SIGTERM)
            until_s = time.monotonic() + signals.grace_s
            over = None


def _stop(pid: int, number: int) -> None:
    """Send torchrun and its workers a signal."""
    with contextlib.suppress(psutil.NoSuchProcess):
        signal_family(psutil.Process(pid), number)
