"""Jobs as containers of a Docker engine, whose client is loaded with `backend` and not before. Imports no torch."""

from service.jobs.backends import Backend
from service.jobs.settings import ServiceSettings


def make(settings: ServiceSettings) -> Backend:
    """The backend. Asks no engine yet."""
    from service.jobs.backends.docker.backend import DockerBackend

    return DockerBackend(settings)
