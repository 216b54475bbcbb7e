"""One attempt of a local job, from its start to its end: `python -m service.jobs.runner ATTEMPT_FOLDER`. No torch.

It outlives the service that has started it. In the attempt's folder lie
order.json        what is to run (no secrets, no tracking address: they are in this process's environment)
runner.lock       locked as long as the runner or the command lives
begun.json        the command's and the runner's processes; where it is, nothing is started any more
stop.json         somebody asks it to stop
log-node0.txt     what the command writes
exit.json         how it ended, written before the lock is let go
"""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from pipelines.amounts import shown_bytes
from service.jobs import memory, memory_group
from service.whole_file import write_json

ORDER = "order.json"
LOCK = "runner.lock"
BEGUN = "begun.json"
STOP = "stop.json"
EXIT = "exit.json"
LOG = "log-node0.txt"
# Which descriptor is the lock, for a runner that its parent has taken it for.
LOCK_VARIABLE = "LOROT_RUNNER_LOCK"
# Whose processes these are, for who looks after them once the runner was killed: the attempt's name.
NAME_VARIABLE = "LOROT_JOB_PROCESS"

_LOOK_S = 0.5
_PR_SET_CHILD_SUBREAPER = 36
_HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def run(folder: Path) -> int:
    """Run the order that lies in `folder`, unless that has been begun before; returns this process's exit code."""
    lock = _lock(folder)
    if lock is None or (folder / BEGUN).exists() or (folder / EXIT).exists():
        return 0
    order = read(folder / ORDER)
    # Taken one by one below: none of them may end this process while the command runs.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_HEEDED, signal.SIGCHLD})
    # What the command leaves behind becomes this process's child, which can then see it and end it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    began = time.time()
    kills = memory.Kills()
    write_json(folder / BEGUN, {"runner": _process(os.getpid()), "started_s": began})
    try:
        attempt = _Attempt(folder, order, lock)
    except OSError as error:
        told = f"{order['command'][0]} cannot be started ({error.strerror})"
        write_json(folder / EXIT, {"exit_code": 127, "reason": told, "started_s": began, "ended_s": time.time()})
        return 0
    write_json(folder / BEGUN, {"runner": _process(os.getpid()), "command": _process(attempt.pid), "started_s": began})
    code = attempt.wait()
    ended = {"exit_code": code, "started_s": began, "ended_s": time.time(), "asked_to_stop": attempt.was_asked}
    out_of_memory, reason = bool(code) and attempt.was_too_large, attempt.said
    if code == -signal.SIGKILL and not attempt.has_killed and not out_of_memory:
        out_of_memory, reason = memory.explain(kills)
    ended |= {"out_of_memory": out_of_memory, "killed_after_grace": attempt.has_killed}
    write_json(folder / EXIT, ended | ({"reason": reason} if reason and code else {}))
    return 0


class _Attempt:
    """The command and all that descends from it."""

    def __init__(self, folder: Path, order: Mapping[str, Any], lock: int) -> None:
        self._stop = folder / STOP
        self._grace_s = float(order["grace_s"])
        allowed = order.get("memory_bytes")
        group = memory_group.made(str(order.get("name", "attempt")), allowed) if allowed else None
        environment = {key: value for key, value in os.environ.items() if key != LOCK_VARIABLE}
        try:
            child = self._started(order, environment, folder / LOG, lock, group)
        except OSError:
            if group is not None:
                group.remove()
            raise
        self.pid = child.pid
        if group is not None and not group.holds(child.pid):
            group.remove()
            group = None
        self._group = group
        self._watch = memory.Watch(int(allowed)) if allowed and group is None else None
        self._allowed_bytes = int(allowed or 0)
        self._child = child
        self._code: int | None = None
        self._deadline = float("inf")
        self.was_asked = False
        self.has_killed = False
        # It used more memory than it may, and what is said of that.
        self.was_too_large = False
        self.said = ""

    @staticmethod
    def _started(
        order: Mapping[str, Any],
        environment: Mapping[str, str],
        path: Path,
        lock: int,
        group: memory_group.Group | None,
    ) -> subprocess.Popen[bytes]:
        with path.open("ab") as log:
            return subprocess.Popen(
                list(order["command"]),
                env={**environment, **order["environment"], NAME_VARIABLE: str(order.get("name", "attempt"))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                start_new_session=True,
                preexec_fn=lambda: _prepare(group),
            )

    def wait(self) -> int:
        """The command's exit code, once nothing of it is left; a negative one is a signal."""
        while self._code is None:
            self._look()
        # What the command has left behind is to end too: it would be in the next attempt's way.
        self._ask(signal.SIGTERM, everybody=True)
        while self._family():
            self._look()
        self._reap()
        if self._group is not None:
            if self._group.kills():
                self._note_memory(f"the kernel killed it at the {shown_bytes(self._allowed_bytes)} allowed")
            self._group.remove()
        return self._code

    def _look(self) -> None:
        """Wait for something to happen, and do what is due."""
        number = signal.sigtimedwait({*_HEEDED, signal.SIGCHLD}, _LOOK_S)
        if number is not None and number.si_signo != signal.SIGCHLD:
            self.was_asked = True
            self._ask(number.si_signo)
        if not self.was_asked and self._stop.exists():
            self.was_asked = True
            self._grace_s = float(read(self._stop).get("grace_s", self._grace_s))
            self._ask(signal.SIGTERM)
        if self._watch is not None and not self.was_too_large and (used := self._watch.look(self._family)):
            self._note_memory(f"used {shown_bytes(used)} of {shown_bytes(self._allowed_bytes)} allowed, and was killed")
            # At once: it would take still more while it is asked, and all the machine has to bear that.
            self._deadline = 0.0
        if time.monotonic() > self._deadline:
            self.has_killed = self.has_killed or (self._code is None and not self.was_too_large)
            self._send(signal.SIGKILL, self._family())
        self._reap()

    def _note_memory(self, what: str) -> None:
        self.was_too_large = True
        self.said = f"{what} (resources.memory); give it more, or a smaller micro_batch"

    def _ask(self, number: int, everybody: bool = False) -> None:
        """Pass a signal on, and see to the kill when the grace is over. `lorot` passes it on to its workers itself."""
        self._deadline = min(self._deadline, time.monotonic() + self._grace_s)
        family = self._family()
        self._send(number, family if everybody else [process for process in family if process.pid == self.pid])

    def _family(self) -> list[psutil.Process]:
        return [process for process in psutil.Process().children(recursive=True) if _lives(process)]

    def _send(self, number: int, processes: list[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.pid:
                    self._code = self._child.returncode = os.waitstatus_to_exitcode(ended[1])


def read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none, or it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _lock(folder: Path) -> int | None:
    """The lock's descriptor; None if another runner has it."""
    given = os.environ.get(LOCK_VARIABLE)
    lock = int(given) if given else os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return lock


def _process(pid: int) -> dict[str, Any]:
    """What tells a process from a later one of the same number."""
    try:
        return {"pid": pid, "started_s": round(psutil.Process(pid).create_time(), 2)}
    except psutil.NoSuchProcess:
        return {"pid": pid, "started_s": 0.0}


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _prepare(group: memory_group.Group | None) -> None:
    """What the command's process does before it becomes the command."""
    if group is not None:
        group.enter()
    # The signals that the runner has blocked would be blocked there as well.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
