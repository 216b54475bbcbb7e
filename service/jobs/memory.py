"""How much memory an attempt's processes use, and what the kernel says of those that it killed for memory. No torch."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

_LOOK_S = 1.0
# Counting what is shared once means that the kernel walks over all pages: at most a twentieth of the time.
_REST = 20.0
_PROCESSES = Path("/proc")
_GROUPS = Path("/proc/self/cgroup")
_MACHINE = Path("/proc/vmstat")
_MOUNTED = Path("/sys/fs/cgroup")


class Watch:
    """Looks once a second whether processes use more than they may together."""

    def __init__(self, allowed_bytes: int) -> None:
        self.allowed_bytes = allowed_bytes
        self._next_s = 0.0

    def look(self, processes: Callable[[], Sequence[psutil.Process]]) -> int:
        """The bytes that they use, if these are too many; 0 if they are not, or it is not yet time to look again."""
        began = time.monotonic()
        if began < self._next_s:
            return 0
        found = used(processes(), self.allowed_bytes)
        if found > self.allowed_bytes:
            # What ends while it is summed up leaves its share to those that are looked at after it: counted twice.
            found = min(found, used(processes(), self.allowed_bytes))
        now = time.monotonic()
        self._next_s = now + max(_LOOK_S, _REST * (now - began))
        return found if found > self.allowed_bytes else 0


def used(processes: Sequence[psutil.Process], enough: int = 0) -> int:
    """Bytes of main memory that these processes take up together; what several of them share is counted once.

    Not counted: files that the kernel keeps in memory for them, also those that they have mapped, since it can drop
    them; what was swapped out; and shared memory that none of them has mapped just now.

    Args:
        enough: where they are not more even if all that is shared is counted several times, that is the answer: it is
            found much faster.
    """
    resident = sum(map(_resident, processes))
    return resident if resident <= enough else sum(map(_share, processes))


class Kills:
    """What the kernel has killed for memory since this was made, as far as it counts that."""

    def __init__(self) -> None:
        self._own, self._all = _in_own_group(), _on_machine()

    def of_own_group(self) -> bool | None:
        """Whether any in this process's group, which others may share; None if that is not counted."""
        return _rose(self._own, _in_own_group())

    def on_machine(self) -> bool | None:
        """Whether any on the whole machine; None if that is not counted."""
        return _rose(self._all, _on_machine())


def explain(kills: Kills) -> tuple[bool, str]:
    """Of a command that SIGKILL has ended, and nobody says why: whether that was for memory, and a sentence for it."""
    of_group, on_machine = kills.of_own_group(), kills.on_machine()
    if of_group:
        return True, ""
    if of_group is False or on_machine is False:
        return False, "killed by signal 9, by somebody else: the kernel has killed nothing for memory meanwhile"
    if on_machine:
        return False, (
            "killed by signal 9, perhaps for memory: the kernel has killed processes of this machine for it meanwhile; "
            "if so, give it more, or a smaller micro_batch"
        )
    return False, "killed by signal 9, by somebody or for memory: this kernel does not count what it kills"


def _resident(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _share(process: psutil.Process) -> int:
    folder = _PROCESSES / str(process.pid)
    with contextlib.suppress(OSError, KeyError):
        told = _sizes(folder / "smaps_rollup")
        if "Pss_Anon" in told:
            return told["Pss_Anon"] + told["Pss_Shmem"]
        # Before Linux 5.4 only their sum with mapped files is told. Of files this takes off what others share as well:
        # rather too little than a kill for what the kernel could drop.
        return max(0, told["Pss"] - _sizes(folder / "status")["RssFile"])
    # It may not be looked at, or has gone.
    with contextlib.suppress(psutil.Error):
        resident = process.memory_info()
        return int(resident.rss - resident.shared)
    return 0


def _sizes(path: Path) -> dict[str, int]:
    """The bytes of each `name: number kB` in a file of the kernel's."""
    lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {words[0]: 1024 * int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def _rose(before: int | None, now: int | None) -> bool | None:
    return None if before is None or now is None else now > before


def _on_machine() -> int | None:
    return _count(_MACHINE)


def _in_own_group() -> int | None:
    """Of cgroups of version 2, or else of version 1; of the whole machine's group nothing is said about us."""
    with contextlib.suppress(OSError):
        for line in sorted(_GROUPS.read_text().splitlines()):
            _, controllers, own = line.split(":", 2)
            if own in ("", "/"):
                continue
            if not controllers:
                found = _count(_MOUNTED / own.lstrip("/") / "memory.events")
            elif controllers == "memory":
                found = _count(_MOUNTED / "memory" / own.lstrip("/") / "memory.oom_control")
            else:
                continue
            if found is not None:
                return found
    return None


def _count(path: Path) -> int | None:
    """The value of `oom_kill` in a file of names and values."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None
