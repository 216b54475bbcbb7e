"""Who works on a run: a process, told from every other one, and whether it is still there."""

import contextlib
import fcntl
import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

# Held by `lorot train` and by its torchrun as long as either of them lives; each of several machines has its own.
LAUNCHER_LOCKS = "launcher*.lock"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Holder:
    """The process that started a run's main worker.

    Attributes:
        host: name of its machine.
        boot: which start of that machine; a machine that was started anew has none of its old processes.
        namespace: of process numbers; a container has its own.
        pid: number of the process.
        started_s: when it began, seconds since the epoch: numbers are given again, with another start.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started_s: float

    @classmethod
    def of(cls, pid: int) -> "Holder":
        """A living process of this machine; raises psutil.NoSuchProcess."""
        started_s = round(psutil.Process(pid).create_time(), 2)
        return cls(socket.gethostname(), _boot(), _namespace(), pid, started_s)

    @classmethod
    def here(cls) -> "Holder":
        """Who answers for this process: torchrun's agent, which starts lost workers again, or else itself."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if "TORCHELASTIC_RUN_ID" in os.environ:
                return cls.of(os.getppid())
        return cls.of(os.getpid())

    @classmethod
    def read(cls, content: Any) -> "Holder | None":
        """What `content` gave, from JSON; None if it is none."""
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            given: Mapping[str, Any] = content
            host, boot, namespace = (str(given[name]) for name in ("host", "boot", "namespace"))
            pid = int(given["pid"])
            return cls(host, boot, namespace, pid, float(given["started_s"])) if pid > 0 else None
        return None

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def label(self) -> str:
        """In one word, different for any two processes."""
        return f"{self.host}/{self.boot}/{self.namespace}/{self.pid}@{self.started_s:.2f}"

    def is_local(self) -> bool:
        """Whether it ran on this machine, in this start of it or an earlier one."""
        return self.host == socket.gethostname()

    def shares_kernel(self) -> bool:
        """Whether it runs under this very kernel, be it in another container: then file locks tell."""
        return self.boot == _boot()

    def is_alive(self) -> bool | None:
        """Whether it runs; None if that cannot be seen from here (another machine, another container)."""
        if self.boot != _boot():
            return False if self.is_local() else None
        if self.namespace != _namespace():
            return None
        try:
            process = psutil.Process(self.pid)
            # In a container whose first process does not look after orphans a dead one keeps its number for ever.
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return began(process, self.started_s)
        except psutil.NoSuchProcess:
            return False


def is_launched(folder: Path) -> bool:
    """Whether `lorot train`, or a torchrun that it started, lives and works in this run folder."""
    return any(is_held(path) for path in folder.glob(LAUNCHER_LOCKS))


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock in this file; asking takes it for a moment."""
    try:
        # Whoever can write there may have put a link or a pipe in its place.
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(lock)
    return False


def began(process: psutil.Process, started_s: float) -> bool:
    """Whether a process began at this moment, seconds since the epoch, as psutil told it to somebody.

    The kernel counts a start in hundredths of a second since the machine's own, to which psutil adds that in whole
    seconds: after the clock was corrected there may be one more or less.
    """
    return abs(process.create_time() - started_s) < 2.0


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return f"{platform.system()}-{psutil.boot_time():.0f}"


def _namespace() -> str:
    try:
        return os.readlink(_NAMESPACE)
    except OSError:
        return ""
