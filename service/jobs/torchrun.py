"""torchrun: its command line, its environment, and what its log says. Imports no torch."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service import machine
from service.jobs.nodes import Nodes, interface_of

WORKER = "service.training.worker"
# Seconds. A machine is taken for lost after interval x attempt without a sign; machines that are too late for the last
# call are taken in by a further round; a round waits for its fewest machines as long as `join`.
_RENDEZVOUS = {
    "is_host": 0,
    "last_call_timeout": 5,
    "keep_alive_interval": 2,
    "keep_alive_max_attempt": 2,
    "join_timeout": 600,
    "read_timeout": 30,
}
# torchrun counts the loss of another machine against its limit of restarts; the launcher keeps a better account.
_UNLIMITED = 1_000_000

# What torchrun writes of each worker that failed, and of those it killed itself because they did not stop in time.
_TABLE = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\n\s*exitcode\s*: (-?\d+) \(pid: (\d+)\)")
_FIRST = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
_FORCED = re.compile(r"Unable to shutdown process (\d+) via")

_LIKELY_CAUSES = {
    signal.SIGKILL: "most likely memory ran out; a smaller micro_batch, fewer workers or data.prefetch=1 need less",
    signal.SIGBUS: "most likely /dev/shm is full; start the container with a larger --shm-size",
    signal.SIGSEGV: "a fault in native code",
    signal.SIGILL: "a library was built for another processor",
    signal.SIGABRT: "a check in native code failed",
}


@dataclass(frozen=True)
class Death:
    """A worker that ended by a signal."""

    rank: int
    pid: int
    signal: int

    def __str__(self) -> str:
        with contextlib.suppress(ValueError):
            number = signal.Signals(self.signal)
            cause = _LIKELY_CAUSES.get(number)
            return f"worker {self.rank} was ended by {number.name} (signal {self.signal})" + (
                f": {cause}" if cause else ""
            )
        return f"worker {self.rank} was ended by signal {self.signal}"


@dataclass(frozen=True)
class Exit:
    """The worker that made torchrun take its machine's workers for failed: a negative code is a signal."""

    code: int
    local_rank: int
    pid: int


def command(
    path: Path | str,
    overrides: Sequence[str],
    *,
    workers: int,
    shutdown_s: int = 30,
    resume: bool = False,
    port: int | None = None,
    module: str = WORKER,
    options: Sequence[str] = (),
    nodes: Nodes | None = None,
    restarts: bool = False,
) -> list[str]:
    """The torchrun command line that starts the workers: training's, or another module's with its own options.

    Args:
        shutdown_s: from a signal to torchrun, which passes it on, to the killing of workers that still run.
        port: for the workers of one machine to meet at; None: a free one.
        nodes: the machines of the job; None: this one alone.
        restarts: start the workers again when one fails. Those of several machines always are.
    """
    program = "torch.distributed.run" if nodes is None else "service.training.agent"
    launcher = [sys.executable, "-m", program, "--nproc-per-node", str(workers)]
    launcher += ["--rdzv-backend", "c10d", "--shutdown-timeout", str(shutdown_s)]
    launcher += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    # Without an address of its own torchrun looks up this machine's name, which may be slow or lead elsewhere.
    if nodes is None:
        launcher += ["--nnodes", "1", "--rdzv-endpoint", f"127.0.0.1:{port or 0}", "--local-addr", "127.0.0.1"]
    else:
        settings = ",".join(f"{name}={value}" for name, value in _RENDEZVOUS.items())
        launcher += ["--nnodes", f"{nodes.least}:{nodes.most}", "--rdzv-endpoint", nodes.endpoint]
        launcher += ["--rdzv-id", nodes.run_id, "--rdzv-conf", settings, "--local-addr", nodes.address]
    if restarts or nodes is not None:
        launcher += ["--max-restarts", str(_UNLIMITED)]
    return [*launcher, "-m", module, str(path), *overrides, *options, *(["--resume"] if resume else [])]


def environment(workers: int, nodes: Nodes | None = None) -> dict[str, str]:
    """This process's environment with what the workers need; what the user has set stays."""
    here = dict(os.environ)
    # The workers leave it to this process to say why they failed, and stop when it is gone.
    here["LOROT_LAUNCHED"] = str(os.getpid())
    here.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // workers)))
    # Shared, the store's address is not published again, and a machine that comes back ends the job after 60 s.
    here.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # By name lookup gloo may pick an address that nothing answers at.
    network = "lo" if nodes is None else interface_of(nodes.address)
    if network:
        here.setdefault("GLOO_SOCKET_IFNAME", network)
    # Where `service.training.pulse` tells that this machine lives; one of several may start a job of its own.
    here.pop("LOROT_RENDEZVOUS", None)
    if nodes is not None:
        here["LOROT_RENDEZVOUS"] = nodes.endpoint
    # DeepSpeed compiles with the ninja beside this interpreter, which an environment that was not activated hides.
    here["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), here.get("PATH", os.defpath)])
    return here


def deaths(log: str) -> list[Death]:
    """The workers that a signal ended, by torchrun's log, without those that torchrun itself had stopped."""
    forced = {int(pid) for pid in _FORCED.findall(log)}
    found = [Death(int(rank), int(pid), -int(code)) for rank, code, pid in _TABLE.findall(log)]
    return [death for death in found if death.signal > 0 and death.signal != signal.SIGTERM and death.pid not in forced]


def exits(log: str) -> list[Exit]:
    """The workers whose end made torchrun restart or end this machine's workers, in the order of the log."""
    return [Exit(int(code), int(rank), int(pid)) for code, rank, pid in _FIRST.findall(log)]
