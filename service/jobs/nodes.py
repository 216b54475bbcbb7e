"""The machines that share one job: how many, where they meet, and which address this one has. Imports no torch."""

import contextlib
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from service import config
from service.config import TrainingConfig
from service.errors import ConfigError

PORT = 29400
# Machines of one job start at different times, and the rendezvous is one of them.
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Nodes:
    """`least` to `most` machines that meet at `host`:`port` under the name `run_id`; this one has `address`."""

    least: int
    most: int
    host: str
    port: int
    run_id: str
    address: str

    @property
    def endpoint(self) -> str:
        """Where the rendezvous listens, as torchrun takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def describe(nnodes: str, meeting: str | None, run_id: str) -> Nodes:
    """This machine's part in a job of several.

    Args:
        nnodes: "MIN:MAX", or one number for exactly so many.
        meeting: "HOST:PORT" or "HOST" of `lorot rendezvous`.

    Raises:
        ConfigError: no such numbers, no place to meet, or no way there.
    """
    numbers = re.fullmatch(r"(\d+)(?::(\d+))?", nnodes)
    least, most = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, 0)
    if not 1 <= least <= most:
        raise ConfigError(f"--nnodes {nnodes}: give the fewest and the most machines, as 1:4, or one number")
    if not meeting:
        raise ConfigError(
            "--nnodes: several machines need a place to meet; start `lorot rendezvous` on a machine that outlives "
            "them, and give each of them --rdzv HOST:PORT as it prints it"
        )
    place = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+))(?::(\d+))?", meeting)
    if place is None or not 0 < int(place[3] or PORT) < 65536:
        raise ConfigError(f"--rdzv {meeting}: write HOST:PORT, or [ADDRESS]:PORT for an IPv6 address")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", run_id):
        raise ConfigError(f"--run-id {run_id!r}: letters, digits, dots, dashes and underscores only")
    host, port = place[1] or place[2], int(place[3] or PORT)
    return Nodes(least, most, host, port, run_id, address_towards(host, port))


def check_batch(job: TrainingConfig, nodes: Nodes, workers: int) -> None:
    """Refuse, with the numbers that work, a global batch that some number of machines could not share evenly.

    Args:
        workers: on each machine.

    Raises:
        ConfigError: naming the numbers of machines that could not.
    """
    micro_batches = job.global_batch // job.micro_batch
    stuck = [count for count in range(nodes.least, nodes.most + 1) if micro_batches % (count * workers)]
    if not stuck:
        return
    fits = [count for count in range(1, micro_batches + 1) if micro_batches % count == 0]
    machines = [str(count // workers) for count in fits if count % workers == 0]
    raise ConfigError(
        f"global_batch {job.global_batch} in micro-batches of {job.micro_batch} makes {micro_batches} of them, which "
        f"{' or '.join(map(str, stuck))} machines of {workers} workers cannot share evenly; numbers of workers that "
        f"can: {', '.join(map(str, fits))}; of such machines: {', '.join(machines) or 'none'}. Every number from "
        "MIN to MAX has to, since machines come and go"
    )


def address_towards(host: str, port: int) -> str:
    """The address under which this machine is seen from there; raises ConfigError if no way leads there."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # A datagram socket only chooses its address; nothing is sent.
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"--rdzv {host}:{port}: no way leads there from this machine ({error})") from None


def interface_of(address: str) -> str | None:
    """The network interface that has the address; None if none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def await_rendezvous(nodes: Nodes, say: Callable[[str], object], patience_s: float = _PATIENCE_S) -> None:
    """Return when something listens where the machines meet; raises ConfigError if nothing does for so long."""
    deadline = time.monotonic() + patience_s
    told = False
    while True:
        with contextlib.suppress(OSError), socket.create_connection((nodes.host, nodes.port), timeout=3):
            return
        if not told:
            say(f"waiting for the rendezvous at {nodes.endpoint}")
            told = True
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--rdzv {nodes.endpoint}: nothing answers there since {patience_s:.0f} s; start "
                f"`lorot rendezvous --port {nodes.port}` on that machine, and let its firewall pass the port"
            )
        time.sleep(0.5)


def workers_of_all(job: TrainingConfig, nodes: Nodes | None, workers: int) -> None:
    """Refuse a batch that this many workers on a machine could not share, on one machine or on several."""
    if nodes is None:
        config.accumulation_steps(job, workers)
    else:
        check_batch(job, nodes, workers)
