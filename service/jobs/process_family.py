"""Signals to a process and to all below it. Imports no torch."""

import contextlib
import signal

import psutil


def signal_family(process: psutil.Process, number: int) -> None:
    """Send a process a signal, which it passes on to its own; SIGKILL, which none can pass on, goes to them as well."""
    if number == signal.SIGKILL:
        kill_family(process)
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def kill_family(process: psutil.Process) -> None:
    """SIGKILL to all below a process, and then to itself."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
