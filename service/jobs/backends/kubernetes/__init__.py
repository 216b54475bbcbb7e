"""Jobs as objects of a Kubernetes cluster, whose client is imported with the first call to one. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.jobs.backends import Backend
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from service.jobs.traits import Traits

if TYPE_CHECKING:
    from service.jobs.manifests import Format

# Where the claim for data is mounted.
_DATA = Path("/data")


def make(settings: ServiceSettings) -> Backend:
    """The backend. Asks no cluster yet."""
    from service.jobs.backends.kubernetes.backend import KubernetesBackend

    return KubernetesBackend(settings)


def _data_roots(settings: ServiceSettings) -> tuple[Path, ...]:
    return (_DATA,) if settings.backends.kubernetes.data_claim else ()


def _manifests(
    spec: JobSpec, settings: ServiceSettings, resolved: Mapping[str, Any], form: "Format"
) -> list[dict[str, Any]]:
    from service.jobs import manifests

    return manifests.documents(spec, settings, resolved, form)


TRAITS = Traits(
    "Kubernetes",
    "objects of a Kubernetes cluster",
    in_containers=True,
    keeps_secrets=True,
    tmp_gib=20,  # of the machine's disk
    data_roots=_data_roots,
    manifests=_manifests,
)
