"""Jobs as objects of a Kubernetes cluster, whose client is loaded with its first call. Imports no torch."""

from service.jobs.backends import Backend
from service.jobs.settings import ServiceSettings


def make(settings: ServiceSettings) -> Backend:
    """The backend. Asks no cluster yet."""
    from service.jobs.backends.kubernetes.backend import KubernetesBackend

    return KubernetesBackend(settings)
