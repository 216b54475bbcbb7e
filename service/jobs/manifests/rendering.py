"""What a job that nobody has handed in would be in a cluster, for dry runs. Asks no cluster. Imports no torch."""

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml

from service import plain_files
from service.jobs import orders
from service.jobs.backends import Order
from service.jobs.job import Attempt, Job
from service.jobs.manifests import pods
from service.jobs.manifests.train_job import train_job
from service.jobs.manifests.workloads import objects
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec

Format = Literal["objects", "trainjob"]
# Not an id that MLflow draws.
PLACEHOLDER = "0" * 32

_ABOUT = {
    "objects": "# What the service would make; kubectl create -f takes it too.\n"
    f"# {PLACEHOLDER} stands for the job's id, which is its MLflow run's: the service puts it in.\n"
    "# To create this by hand, make a run first and write its id wherever the zeros are.\n",
    "trainjob": "# For Kubeflow Trainer; kubectl create -f takes it. The service does not follow such a job, which\n"
    "# opens an MLflow run of its own, and has a folder of its own name in the volume of results.\n",
}


def documents(
    spec: JobSpec, settings: ServiceSettings, resolved: Mapping[str, Any], format: Format = "objects"
) -> list[dict[str, Any]]:
    """The objects of a job. As a TrainJob it has a name and a folder that no other has.

    Args:
        resolved: the configuration, as `Desk.check` returns it; empty for a container.

    Raises:
        ConfigError: the job cannot be a TrainJob, or would not reach the tracking database.
    """
    place = settings.backends.kubernetes
    is_export = format == "trainjob"
    own = f"lorot-export-{secrets.token_hex(6)}" if is_export else PLACEHOLDER
    attempt = Attempt(number=1, name=own if is_export else f"lorot-{PLACEHOLDER[:12]}-1")
    job = Job(id=own, experiment_id="", spec=spec, state="queued", attempts=(attempt,))
    order = orders.order(job, attempt, settings, resolved)
    values = orders.configuration(job, settings, resolved) if resolved else {}
    if not is_export:
        return objects(order, place, _yaml(values), jobsets=place.kind != "job")
    if values:
        # Its run is called as its folder is, and nobody has named that one after the job.
        values |= {"name": spec.name, "output": f"{pods.FOLDER}/{orders.RUN}"}
    return train_job(order, place, _yaml(values))


def text(documents: Sequence[Mapping[str, Any]], format: Format = "objects") -> str:
    """The same as YAML that kubectl reads, with a word on what it is."""
    return _ABOUT[format] + yaml.safe_dump_all(documents, sort_keys=False, width=120)


def configuration_of(order: Order) -> str:
    """What job.yaml holds for this order."""
    with contextlib.suppress(OSError):
        return plain_files.text(order.folder, orders.CONFIGURATION)
    return _yaml(order.job.spec.config)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False)
