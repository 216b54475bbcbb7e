"""Where jobs run: `local`, `docker`, `kubernetes`, and whatever else lies here. Found by name. Imports no torch.

Another one is one file here, or a package, and its section of the settings. The file has

- `TRAITS`, its `service.jobs.traits.Traits`: what others than itself have to know of it;
- `Settings`, a `Section` with `enabled` and its own keys: what the settings' file may hold under backends.NAME
  (those of the first three are fields of `service.jobs.settings.BackendSettings`);
- `make(settings)`, which returns its `Backend`.

It is imported wherever somebody looks at a job of it, so what is slow to import is imported by `make`, or later.

Every call may be repeated without effect: the service can be killed between asking and writing down that it has asked.
What a backend makes carries the attempt's name, so it is found again without any note.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from service.errors import ConfigError
from service.jobs.job import Job
from service.jobs.settings import ServiceSettings
from service.jobs.traits import NAMES, module

Handle = Mapping[str, Any]


@dataclass(frozen=True)
class Order:
    """What a backend is to start.

    Attributes:
        name: the attempt's; the same order twice starts one thing.
        job: whose attempt it is; `job.spec` has image, nodes, resources, secrets, grace.
        folder: the job's own on this machine: results go there. Where the job sees it: `service.jobs.orders.Places`.
        command: program and arguments of one node, with the paths as the job sees them.
        environment: variables, without secrets.
        number: of the attempt, from 1.
        gpus: which of this machine's GPUs are the attempt's, counted from 0 among those that the service sees; empty
            without any, and for a place that chooses itself.
    """

    name: str
    job: Job
    folder: Path
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    number: int = 1
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Status:
    """How an attempt stands.

    Attributes:
        phase: "waiting": made, but not running yet (a cluster's queue, an image that is pulled); "running"; "ended";
            "gone": nothing of that name is there, and nothing says how it ended.
        exit_code: of the command, once it has ended and somebody knows; a negative one is a signal.
        reason: why, in a sentence; "" while it runs or after success.
        preempted: it was ended for others' sake, by no fault of its own: it does not count against the retries.
        out_of_memory: it was killed for the memory that it took.
        image_digest: of the image that runs, sha256:...; "" without one.
        started_s, ended_s: seconds since the epoch; 0: not yet or unknown.
        nodes: a line for each node, as "node 0: running", for people.
    """

    phase: Literal["waiting", "running", "ended", "gone"]
    exit_code: int | None = None
    reason: str = ""
    preempted: bool = False
    out_of_memory: bool = False
    image_digest: str = ""
    started_s: float = 0.0
    ended_s: float = 0.0
    nodes: tuple[str, ...] = ()


class Backend(Protocol):
    """One place where jobs run. Raises BackendError where it does not answer, ConfigError for what it cannot do."""

    name: str

    def check(self, job: Job) -> None:
        """Refuse, before anything is recorded, what this place cannot do; raises ConfigError."""
        ...

    def start(self, order: Order) -> Handle:
        """Make it, or find what an earlier call has made; returns at once."""
        ...

    def status(self, name: str, handle: Handle) -> Status:
        """How the attempt stands; by name alone where the handle is empty."""
        ...

    def logs(
        self,
        name: str,
        handle: Handle,
        *,
        node: int = 0,
        tail: int | None = None,
        follow: Callable[[], bool] | None = None,
        since: str = "",
    ) -> Iterator[bytes]:
        """What a node has written, in pieces; the last `tail` lines; on and on while `follow()` and it runs.

        Following yields b"" now and then, so that whoever reads can stop. A tail that is followed may come with pieces
        that are `places.Placed`: `since` follows the log from such a place on, byte for byte, also in another process.
        Raises PlaceLostError before the first piece where it is not to be found.
        """
        ...

    def cancel(self, name: str, handle: Handle, grace_s: float) -> None:
        """Ask it to stop, and see to it that it is killed after `grace_s`; returns at once."""
        ...

    def remove(self, name: str, handle: Handle) -> None:
        """Clear away what an attempt that has ended leaves there. Its results and logs in the job's folder stay."""
        ...

    def reconcile(self) -> dict[str, str]:
        """Everything there that carries our label: attempt names, and the job's id of each."""
        ...

    def close(self) -> None:
        """Let go of connections; nothing that runs is touched."""
        ...


def enabled(settings: ServiceSettings) -> list[str]:
    """The names of those that are switched on here."""
    # Settings that were made without a file have no section of a backend that brings its own: it is off.
    return [name for name in NAMES if getattr(getattr(settings.backends, name, None), "enabled", False)]


def load(name: str, settings: ServiceSettings) -> Backend:
    """The backend of this name, as its module makes it; raises ConfigError if it is off, or there is none."""
    on = enabled(settings)
    if name not in on:
        remedy = f"; its settings switch it on: backends.{name}.enabled: true" if name in NAMES else ""
        raise ConfigError(f"backend {name!r} is not set up here, on are: {', '.join(on) or 'none'}{remedy}")
    backend: Backend = module(name).make(settings)
    return backend
