"""Who may write to a run's folder: one job at a time, however it was started and on whichever machine. No torch.

`worker.lock` is locked by the main worker (flock), which the kernel ends with the process, whatever becomes of it.
Some shared disks keep such locks to one machine, others keep the lock of a machine that lost its power until a lease
ends. For them the owner writes a growing number into `owner.json` once a second. Whoever comes from another machine
watches it for a while: if it grows, the owner lives; if it does not, its lock means nothing. An owner that was taken
for dead and was not, as after a long pause of its machine, finds another's name there before it writes, and ends.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service import plain_files
from service.errors import StorageError, SucceededError, TakenError

LOCK = "worker.lock"
OWNER = "owner.json"
BEAT_S = 1.0
# How long one waits for a lock that a dying process still holds, or for a sign of life of another machine's job.
WATCH_S = 5.0
_LENGTH = 512


class Ownership:
    """A claim to a folder; `take` it before anything in the folder is read or changed.

    Args:
        folder: of the run; it exists.
        machine: what tells this machine from others; None: its kernel's start, which containers on it share.
    """

    def __init__(self, folder: Path, machine: str | None = None) -> None:
        self._folder = folder
        self._machine = machine or _machine()
        self._token = secrets.token_hex(8)
        self._lock = -1
        self._is_locked = False
        self._beats = 0
        self._ended = threading.Event()
        # Held from a look at whose the folder is until what follows from it is written.
        self._writing = threading.Lock()
        self._successor = ""

    @property
    def lost(self) -> bool:
        """Whether another job was found to have the folder, at a `check` or at a sign of life, one of a second."""
        return bool(self._successor)

    def take(self) -> None:
        """Make the folder this process's.

        Raises:
            TakenError: it is another's, and whose.
            StorageError: it cannot be written.
        """
        try:
            self._lock = plain_files.regular(self._folder / LOCK, os.O_RDWR | os.O_CREAT)
            self._is_locked = self._wait_for_lock()
            before = read(self._folder / OWNER)
            # The kernel of an owner that held the lock has let go of it.
            is_dead = self._is_locked and self._locks_here(before)
            if before and not is_dead and self._lives(before):
                raise refusal(self._folder, before)
            self._beat()
        except OSError as error:
            self.release()
            raise StorageError(
                f"{self._folder}: cannot be written ({error.strerror}); output=FOLDER chooses another"
            ) from None
        except TakenError:
            self.release()
            raise
        threading.Thread(target=self._go_on_beating, name="owner", daemon=True).start()

    def check(self) -> None:
        """Raise SucceededError if another job has taken the folder, because this one seemed dead."""
        owner = read(self._folder / OWNER)
        if owner and owner.get("token") != self._token:
            self._successor = _name(owner)
        if self._successor:
            # Also when that one has ended since.
            raise SucceededError(
                f"{self._folder}: {self._successor} has taken this run over while this worker stood still; "
                "nothing more is written from here"
            )

    def release(self) -> None:
        """Let others have the folder."""
        with self._writing:
            self._ended.set()
            if self._lock >= 0:
                if self._beats and read(self._folder / OWNER).get("token") == self._token:
                    with contextlib.suppress(OSError):
                        (self._folder / OWNER).unlink()
                os.close(self._lock)
                self._lock = -1

    def _wait_for_lock(self) -> bool:
        """Lock the file; whether that was possible and means anything.

        It is not on a disk that has no such locks, and need not be where a lost machine's are kept for it.
        """
        deadline = time.monotonic() + WATCH_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    owner = read(self._folder / OWNER)
                    if owner and not self._locks_here(owner):
                        return False
                    raise refusal(self._folder, owner) from None
                time.sleep(0.1)
            except OSError:
                return False

    def _locks_here(self, owner: dict[str, Any]) -> bool:
        """Whether the owner's lock, held by this machine's kernel, tells whether it lives."""
        return owner.get("machine") == self._machine and bool(owner.get("locked", True))

    def _lives(self, before: dict[str, Any]) -> bool:
        deadline = time.monotonic() + WATCH_S
        while time.monotonic() < deadline:
            time.sleep(BEAT_S / 4)
            now = read(self._folder / OWNER)
            if now and (now.get("token"), now.get("beat")) != (before.get("token"), before.get("beat")):
                return True
        return False

    def _go_on_beating(self) -> None:
        while not self._ended.wait(BEAT_S):
            # A disk that fails for a moment is no reason to end a training; neither is it one to overwrite another.
            with contextlib.suppress(OSError, StorageError), self._writing:
                if not self._ended.is_set():
                    self.check()
                    self._beat()

    def _beat(self) -> None:
        self._beats += 1
        content = here() | {
            "machine": self._machine,
            "locked": self._is_locked,
            "token": self._token,
            "beat": self._beats,
            "time_s": round(time.time(), 1),
        }
        # In place and of one length: opened anew, it is looked up anew on a shared disk, and a full disk takes it too.
        descriptor = plain_files.regular(self._folder / OWNER, os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(descriptor, json.dumps(content).ljust(_LENGTH).encode(), 0)
        finally:
            os.close(descriptor)


def refuse_if_owned(folder: Path) -> bool:
    """Raise TakenError if a job of this machine, or a visible one of another, has the folder now.

    Returns whether that says something: nobody can be seen to have a folder that was never taken.
    """
    if not (folder / LOCK).exists():
        return False
    claim = Ownership(folder)
    claim.take()
    claim.release()
    return True


def refusal(folder: Path, holder: Mapping[str, Any]) -> TakenError:
    """The error for a folder that is another job's: `holder` has what `here` gave there, or nothing."""
    return TakenError(
        f"{folder}: another job runs there ({_name(holder)}); wait for its end, or give this one name=OTHER"
    )


def here() -> dict[str, Any]:
    """How people find this process."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def read(path: Path) -> dict[str, Any]:
    """What a holder wrote into a file last; empty if there is none, or it was being written just now."""
    try:
        with os.fdopen(plain_files.regular(path, os.O_RDONLY), "rb") as file:
            content = json.loads(file.read(16 * _LENGTH))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _name(owner: Mapping[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "an unknown process"


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
