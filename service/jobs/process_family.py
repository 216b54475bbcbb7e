"""Processes that belong together, and signals to them. Imports no torch."""

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


def marked(variable: str, value: str) -> list[psutil.Process]:
    """The processes with this variable in their environment: those that were given it, and whatever they have started.

    It takes no parents: who has lost them is found all the same. One of another user is not, nor one that has
    overwritten its environment.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_family(process: psutil.Process) -> None:
    """SIGKILL to all below a process, and then to itself."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
