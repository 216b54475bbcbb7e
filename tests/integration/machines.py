"""Machines that are real to everything but the kernel: network namespaces on one bridge, each with its own address.

The bridge lies in a namespace of its own too, where what outlives the machines runs; nothing of the host's network is
touched, and no packet leaves it.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration import debian
from tests.integration.debian import RefusedError

ROOT = Path(__file__).parents[2]
PROGRAMS = {"ip": "iproute2", "nsenter": "util-linux"}
_numbers = itertools.count()


@dataclass
class Machine:
    """A network namespace with an address, and the processes that a test has started there."""

    namespace: str
    address: str
    hub: str
    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Run Python with these arguments there; what it says goes to a file of the machine's."""
        return self.run(sys.executable, *arguments, **variables)

    def run(self, *program: str, **variables: str) -> subprocess.Popen[str]:
        """Run a program there, which finds this environment's commands."""
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        line = ["nsenter", f"--net=/run/netns/{self.namespace}", *program]
        with self.said.open("a") as said:
            process = subprocess.Popen(
                line, cwd=self.folder, env=environment, stdout=said, stderr=said, text=True, start_new_session=True
            )
        self.started.append(process)
        return process

    @property
    def said(self) -> Path:
        """What its processes wrote."""
        return self.folder / f"said-{self.address}.txt"

    def pids(self) -> list[int]:
        """All processes that live there."""
        listed = _ip("netns", "pids", self.namespace)
        return [int(pid) for pid in listed.split()]

    def kill(self) -> float:
        """End all of its processes at once, as a crash would; returns when."""
        when = time.monotonic()
        # Twice: one may have been starting another.
        for _ in range(2):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for process in self.started:
            process.wait()
        return when

    def set_link(self, state: str) -> None:
        """Pull the cable ("down") or put it back ("up")."""
        _ip("-n", self.hub, "link", "set", f"to-{self.address.rpartition('.')[2]}", state)

    def workers(self) -> list[int]:
        """Training workers that live there."""
        return [pid for pid in self.pids() if b".worker" in _line_of(pid) and _is_worker(pid)]


@dataclass
class Network:
    """Machines on one bridge; `hub` is where the bridge is, and what outlives them."""

    hub: Machine
    machines: list[Machine]


@contextlib.contextmanager
def network(count: int, folder: Path) -> Iterator[Network]:
    """So many machines, connected; raises RefusedError where there are no programs for that, or the kernel refuses."""
    debian.install(PROGRAMS)
    tag = f"lorot-{os.getpid()}-{next(_numbers)}"
    hub = Machine(f"{tag}-hub", "10.77.0.1", f"{tag}-hub", folder)
    machines = [Machine(f"{tag}-{n}", f"10.77.0.{n}", hub.namespace, folder) for n in range(2, 2 + count)]
    everyone = [hub, *machines]
    try:
        try:
            _build(hub, machines)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise RefusedError(f"network namespaces cannot be made here: {said.strip()}") from None
        yield Network(hub, machines)
    finally:
        for machine in everyone:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                machine.kill()
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("netns", "delete", machine.namespace)


def _build(hub: Machine, machines: Sequence[Machine]) -> None:
    for machine in [hub, *machines]:
        _ip("netns", "add", machine.namespace)
        _ip("-n", machine.namespace, "link", "set", "lo", "up")
    _ip("-n", hub.namespace, "link", "add", "bridge", "type", "bridge")
    _ip("-n", hub.namespace, "address", "add", f"{hub.address}/24", "dev", "bridge")
    _ip("-n", hub.namespace, "link", "set", "bridge", "up")
    for machine in machines:
        port = f"to-{machine.address.rpartition('.')[2]}"
        peer = ["peer", "name", "eth0", "netns", machine.namespace]
        _ip("-n", hub.namespace, "link", "add", port, "type", "veth", *peer)
        _ip("-n", hub.namespace, "link", "set", port, "master", "bridge", "up")
        _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", "eth0")
        _ip("-n", machine.namespace, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


def _line_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _is_worker(pid: int) -> bool:
    """Not torchrun, which has the worker's name in its command line too, nor a process that a worker forked."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return False
    # Of torchrun, plain or as `lorot train` starts it.
    return b"\0LOCAL_RANK=" in environment and b"--nproc-per-node" in _line_of(parent)
