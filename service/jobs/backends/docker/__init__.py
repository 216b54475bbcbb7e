"""Jobs as containers of a Docker engine, whose client is imported when the backend is made. Imports no torch."""

from service.jobs.backends import Backend
from service.jobs.settings import ServiceSettings
from service.jobs.traits import Traits

TRAITS = Traits(
    "Docker",
    "containers of a Docker engine",
    in_containers=True,
    uses_this_machine=True,
    takes_mounts=True,
    gives_folders=True,
    tmp_gib=2,  # of memory
)


def make(settings: ServiceSettings) -> Backend:
    """The backend. Asks no engine yet."""
    from service.jobs.backends.docker.backend import DockerBackend

    return DockerBackend(settings)
