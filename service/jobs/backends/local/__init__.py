"""Jobs as processes of this machine. What needs more than this package's first lines is in `backend`. No torch."""

from service.jobs.backends import Backend
from service.jobs.settings import ServiceSettings


def make(settings: ServiceSettings) -> Backend:
    """The backend."""
    from service.jobs.backends.local.backend import Local

    return Local(settings)
