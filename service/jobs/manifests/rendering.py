"""The objects of a job as YAML, for `lorot submit --dry-run`. Asks no cluster. Imports no torch."""

import contextlib
from typing import Any, Literal

import yaml

from service import plain_files
from service.jobs import orders
from service.jobs.backends import Order
from service.jobs.job import Attempt, Job
from service.jobs.manifests.train_job import train_job
from service.jobs.manifests.workloads import objects
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec

Format = Literal["objects", "trainjob"]
# Not an id that MLflow draws.
PLACEHOLDER = "0" * 32

_ABOUT = {
    "objects": "# What the service would make; kubectl create -f takes it too.\n",
    "trainjob": "# For Kubeflow Trainer; kubectl create -f takes it. The service does not follow such a job.\n",
}
_PLACEHOLDER = (
    f"# {PLACEHOLDER} stands for the job's id, which is its MLflow run's: the service puts it in.\n"
    "# To create this by hand, make a run first and write its id wherever the zeros are.\n"
)


def placeholder(spec: JobSpec) -> tuple[Job, Attempt]:
    """A job that was not submitted, and its first attempt, for `service.jobs.orders.order`."""
    attempt = Attempt(number=1, name=f"lorot-{PLACEHOLDER[:12]}-1")
    return Job(id=PLACEHOLDER, experiment_id="", spec=spec, state="queued", attempts=(attempt,)), attempt


def rendered(
    order: Order,
    settings: ServiceSettings,
    format: Format = "objects",
    *,
    configuration: str | None = None,
    jobsets: bool | None = None,
) -> str:
    """All documents of an order.

    Args:
        configuration: what job.yaml holds; None: that of the job's folder, or the job's own keys while there is none.
        jobsets: the cluster has JobSets; None: unless the settings say that Jobs are wanted.

    Raises:
        ConfigError: the job cannot be a TrainJob.
    """
    place = settings.backends.kubernetes
    text = configuration if configuration is not None else configuration_of(order)
    documents: list[dict[str, Any]]
    if format == "trainjob":
        documents = train_job(order, place, text)
    else:
        documents = objects(order, place, text, jobsets=place.kind != "job" if jobsets is None else jobsets)
    about = _ABOUT[format] + (_PLACEHOLDER if order.job.id == PLACEHOLDER else "")
    return about + yaml.safe_dump_all(documents, sort_keys=False, width=120)


def configuration_of(order: Order) -> str:
    """What job.yaml holds for this order."""
    with contextlib.suppress(OSError):
        return plain_files.text(order.folder, orders.CONFIGURATION)
    return yaml.safe_dump(order.job.spec.config, sort_keys=False)
