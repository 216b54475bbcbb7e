"""Orders for a cluster, of every shape that jobs have."""

from pathlib import Path
from typing import Any

from service.jobs import orders
from service.jobs.backends import Order
from service.jobs.job import Attempt, Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec

JOB_ID = "c0ffee" + "0" * 25 + "1"
NAME = "lorot-c0ffee000000-1"


def settings(tmp_path: Path, **place: Any) -> ServiceSettings:
    """Of a service in a cluster; `place` is backends.kubernetes."""
    base = {"enabled": True, "namespace": "jobs", "image": "registry.lan/lorot:1", "results_claim": "results"}
    return ServiceSettings.model_validate(
        {
            "state": str(tmp_path / "state"),
            "results": str(tmp_path / "results"),
            "tracking_uri": "http://mlflow:5000",
            "backends": {"kubernetes": {**base, **place}},
        }
    )


def job(**given: Any) -> Job:
    """A job for a cluster, as submitted."""
    spec = {"kind": "train", "name": "a-run", "backend": "kubernetes", "retries": 3, **given}
    return Job(JOB_ID, "0", JobSpec.model_validate(spec), "starting", attempts=(Attempt(1, NAME),))


def order(service: ServiceSettings, **given: Any) -> Order:
    """What the service orders for the first attempt of such a job, with its folder made."""
    found = job(**given)
    assert found.attempt is not None
    made = orders.order(found, found.attempt, service, {})
    orders.prepare(made, service, {"global_batch": 64})
    return made


CONTAINER = {"kind": "container", "command": ("python3", "-c", "print('$HOME $$ $(HOME)')"), "outputs": ("a.csv",)}
# Every shape: what it is called, and what is submitted.
SHAPES: dict[str, dict[str, Any]] = {
    "one node": {},
    "one node with all there is": {
        "resources": {"gpus": 8, "cpus": 64, "memory": "512GB", "shm": "64GiB"},
        "environment": {"A": "1", "B": "$(A) costs $5"},
        "secrets": {"STORE_KEY": "store"},
        "grace_s": 120,
        "image": "registry.lan/mine:2",
    },
    "gang": {"nodes": "4", "resources": {"gpus": 8, "cpus": 64, "memory": "512GB"}},
    "elastic": {"nodes": "2:4", "resources": {"gpus": 1}},
    "detector": {"kind": "detect", "model": "models:/small@best", "nodes": "2"},
    "masks on one node": {"kind": "segment", "model": "models:/small/1"},
    "container": CONTAINER,
    "containers that meet": {
        "kind": "container",
        "command": ("torchrun", "--rdzv-endpoint", "{rendezvous}", "a.py"),
        "nodes": "2",
    },
    "containers that do not meet": {**CONTAINER, "nodes": "3"},
}
PLACES: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {
        "queue": "lorot",
        "data_claim": "data",
        "job_secret": "job-variables",
        "service_account": "lorot-job",
        "priority_class": "low",
        "rdma": "rdma/hca",
        "gpu": "amd.com/gpu",
    },
    "no volumes": {"results_claim": None},
}
