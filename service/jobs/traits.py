"""How the places where jobs run differ, as far as others than themselves ask, and which there are. Imports no torch.

Nothing outside of `service.jobs.backends` knows one by its name: whoever has to do things differently asks for a trait.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from service.errors import ConfigError

if TYPE_CHECKING:
    # These know the names, which are found here.
    from service.jobs.manifests import Format
    from service.jobs.settings import ServiceSettings
    from service.jobs.spec import JobSpec

# As they are listed: the first one that can do it is what a job gets that names none. Others follow by their names.
_FIRST = ("local", "docker", "kubernetes")


def _none(_: "ServiceSettings") -> tuple[Path, ...]:
    return ()


@dataclass(frozen=True)
class Traits:
    """What a backend's module declares as `TRAITS`.

    Attributes:
        title: its name on the console's form, as "Docker".
        jobs_are: what a job is there, as "containers of a Docker engine".
        in_containers: its jobs run in containers: of an image, by its `lorot` or any command, on several nodes if asked
            to, as a user of their own, with their folder at /job and results at /results. False: they are processes of
            this machine, of the service's own user and interpreter, and see its paths as they are.
        uses_this_machine: its jobs take from this machine's GPUs, cores and memory, which the service's queue counts.
            False: the place has a queue of its own, and they are handed over to it at once.
        takes_mounts: a job may ask to see folders of the host; which ones, the backend's `check` says.
        keeps_secrets: it has its own, which a job names. False: the service reads their values from its folder of
            secrets; the backend asks `orders.secret_values` for them when it starts the job.
        gives_folders: its `start` makes run/ and outputs/ in the job's folder and gives them to the containers' user.
            False: the service makes them before that, for places in containers; these mount what they find.
        writes_logs_here: what a node writes is at once in attempts/NUMBER/log-nodeN.txt of the job's folder; it is
            followed there. False: the backend's `logs` is asked.
        tmp_gib: what /tmp of a node holds, GiB: there jobs in containers keep remote files; None: no bound.
        data_roots: folders with data that its jobs see besides those of the settings, as they see them.
        manifests: the objects that it would make for a job, as Kubernetes has them, for dry runs; takes what
            `service.jobs.manifests.documents` takes. None: it makes none.
    """

    title: str
    jobs_are: str
    in_containers: bool
    uses_this_machine: bool = False
    takes_mounts: bool = False
    keeps_secrets: bool = False
    gives_folders: bool = False
    writes_logs_here: bool = False
    tmp_gib: int | None = None
    data_roots: "Callable[[ServiceSettings], Sequence[Path]]" = _none
    manifests: "Callable[[JobSpec, ServiceSettings, Mapping[str, Any], Format], list[dict[str, Any]]] | None" = None


def _found() -> tuple[str, ...]:
    lying = pkgutil.iter_modules([str(Path(__file__).parent / "backends")])
    there = sorted(module.name for module in lying if not module.name.startswith("_"))
    return (*(name for name in _FIRST if name in there), *(name for name in there if name not in _FIRST))


# Every module that lies directly in `service.jobs.backends` and has a public name.
NAMES: tuple[str, ...] = _found()


@functools.cache
def module(name: str) -> ModuleType:
    """The backend's own, imported when it is asked for.

    Raises:
        ConfigError: there is none of this name, or it cannot be imported.
    """
    if name not in NAMES:
        raise ConfigError(f"backend: {name!r} is none of {', '.join(NAMES)}")
    path = f"service.jobs.backends.{name}"
    try:
        return importlib.import_module(path)
    except ImportError as error:
        raise ConfigError(f"backend {name}: {path} cannot be imported ({error}); mend it, or take it away") from error


def of(name: str) -> Traits:
    """The traits of the backend of this name; raises ConfigError for a name that there is not."""
    declared: Traits = module(name).TRAITS
    return declared


def those(condition: Callable[[Traits], object]) -> list[str]:
    """The names of the backends whose traits fulfil it."""
    return [name for name in NAMES if condition(of(name))]


def either(names: Sequence[str]) -> str:
    """Names to choose from, in words: `docker or kubernetes`, `local, docker or kubernetes`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
