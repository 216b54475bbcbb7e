"""A limit of memory that the kernel itself keeps: a group of processes of its own (cgroup v2). Imports no torch.

It takes a part of the tree of groups that was handed over to the service, and that the service's own processes are not
directly in: of a systemd unit, `Delegate=memory` and `DelegateSubgroup=service` (systemd 254 or newer). Where that is
not so, nothing is made here, and `service.jobs.memory` watches instead.
"""

import contextlib
import os
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_PROCESSES = "cgroup.procs"
_DELEGATED = ("user.delegate", "trusted.delegate")


class Group:
    """One group of processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def enter(self) -> None:
        """Put this very process there, with all that it will start; one that is not let in stays where it is."""
        with contextlib.suppress(OSError), open(self.path / _PROCESSES, "wb", buffering=0) as file:
            file.write(b"0")

    def holds(self, pid: int) -> bool:
        """Whether a process is there."""
        with contextlib.suppress(OSError):
            return str(pid) in (self.path / _PROCESSES).read_text().split()
        return False

    def kills(self) -> int:
        """Processes of it that the kernel has killed for its limit."""
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())
            return int(counts.get("oom_kill", 0))
        return 0

    def remove(self) -> None:
        """Let it go; one in which something still runs stays."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def made(name: str, allowed_bytes: int) -> Group | None:
    """A group whose processes may use so much together, beside this process's own; None where none can be made."""
    parent = _handed_over()
    return None if parent is None else below(parent, name, allowed_bytes)


def let_go(name: str) -> None:
    """Remove the group `name` that was made, by whatever process of the service's group; one in use stays."""
    parent = _handed_over()
    if parent is not None:
        Group(parent / name).remove()


def below(parent: Path, name: str, allowed_bytes: int) -> Group | None:
    """The group `name` in `parent`; None if it cannot be made, or would not be limited."""
    path = parent / name
    try:
        if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
            (parent / "cgroup.subtree_control").write_text("+memory")
        path.mkdir(exist_ok=True)
        try:
            # Opened, not made: where the kernel has put no such file, the group limits nothing.
            for file, text in (("memory.max", str(allowed_bytes)), ("memory.oom.group", "1")):
                _write(path / file, text)
        except OSError:
            path.rmdir()
            raise
        with contextlib.suppress(OSError):
            _write(path / "memory.swap.max", "0")
    except OSError:
        return None
    return Group(path)


def _write(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY), "w") as file:
        file.write(text)


def _handed_over() -> Path | None:
    """The group above this process's own, if somebody has given it to us; None if not."""
    try:
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        mount = next(line.split()[4] for line in _MOUNTS.read_text().splitlines() if " - cgroup2 " in line)
    except (OSError, StopIteration, IndexError):
        return None
    if own.count("/") < 2:
        return None
    parent = Path(mount) / own.strip("/").rpartition("/")[0]
    for name in _DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(parent, name) == b"1":
                return parent
    return None
