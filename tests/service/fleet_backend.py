"""Jobs as containers on the machines of a fleet: a backend in one file, as its author writes it. It only remembers."""

from pathlib import Path

from pydantic import Field

from service.config_fields import Section
from service.errors import ConfigError
from service.jobs.backends import Backend
from service.jobs.job import Job
from service.jobs.settings import ServiceSettings
from service.jobs.traits import Traits
from tests.service.memory_backend import MemoryBackend


class Settings(Section):
    """Jobs on the machines of a fleet."""

    enabled: bool = Field(False, description="run jobs there")
    machines: int = Field(4, ge=1, description="most that a job may have")


TRAITS = Traits(
    "a fleet",
    "containers of a fleet",
    in_containers=True,
    keeps_secrets=True,
    tmp_gib=10,
    data_roots=lambda settings: (Path("/fleet"),),
)


def make(settings: ServiceSettings) -> Backend:
    """The backend."""
    return Fleet(settings)


class Fleet(MemoryBackend):
    """See `service.jobs.backends.Backend`."""

    def __init__(self, settings: ServiceSettings) -> None:
        super().__init__("fleet")
        section = getattr(settings.backends, "fleet")  # noqa: B009 - no type checker knows it
        self._machines = section.machines

    def check(self, job: Job) -> None:
        if job.spec.most_nodes > self._machines:
            raise ConfigError(f"nodes: the fleet has {self._machines}")
