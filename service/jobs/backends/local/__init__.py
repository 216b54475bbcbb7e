"""Jobs as processes of this machine. What it takes to run them is imported when one is made. Imports no torch."""

from service.jobs.backends import Backend
from service.jobs.settings import ServiceSettings
from service.jobs.traits import Traits

TRAITS = Traits(
    "this machine",
    "a process of this machine",
    in_containers=False,
    uses_this_machine=True,
    writes_logs_here=True,
)


def make(settings: ServiceSettings) -> Backend:
    """The backend."""
    from service.jobs.backends.local.backend import Local

    return Local(settings)
