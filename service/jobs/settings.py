"""How an operator sets up the job service: which backends, roots and amounts a job may use. Imports no torch."""

import urllib.parse
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model

from service.config_fields import Positive, Section
from service.jobs import traits
from service.jobs.spec import Size

# What an address of data begins with.
REMOTE = ("s3://", "gs://", "http://", "https://")


def _address(value: str) -> str:
    scheme, _, rest = value.partition("://")
    if f"{scheme}://" not in REMOTE or rest[:1] in ("", "/") or ".." in rest.split("/"):
        raise ValueError(f"write {', '.join(REMOTE)} with a bucket or host, as s3://bucket/sets; not {value!r}")
    return value.rstrip("/")


def _page(value: str) -> str:
    if not value.startswith(("http://", "https://")) or not urllib.parse.urlsplit(value).hostname:
        raise ValueError("write http:// or https:// with a host, as http://mlflow.lan:5000")
    return value


Address = Annotated[str, AfterValidator(_address)]
Page = Annotated[str, AfterValidator(_page)]


class LocalSettings(Section):
    """Jobs as processes of this machine."""

    enabled: bool = Field(True, description="run jobs as processes of this machine, under the service's user")
    environment: tuple[str, ...] = Field(
        (), description="variables that jobs may set, besides those of threads, NCCL and the like; WANDB_* is a prefix"
    )


class DockerSettings(Section):
    """Jobs as containers of a Docker engine."""

    enabled: bool = Field(False, description="run jobs as containers")
    url: str | None = Field(None, description="the engine, as unix:///var/run/docker.sock; default: DOCKER_HOST")
    image: str = Field("lorot:latest", description="of a job that names none")
    images: tuple[str, ...] = Field(
        ("*",), description="patterns of images that jobs may name, as registry.lan/lorot:*"
    )
    network: str | None = Field(None, description="network that containers join, to reach the tracking server")
    user: str = Field("1000:1000", description="UID:GID that containers run as; 0 is refused")
    pids: int = Field(4096, ge=16, description="processes and threads of a container")


class KubernetesSettings(Section):
    """Jobs as objects of a Kubernetes cluster."""

    enabled: bool = Field(False, description="run jobs in a cluster")
    kubeconfig: Path | None = Field(None, description="default: the pod's own account, else ~/.kube/config")
    context: str | None = Field(None, description="of the kubeconfig; default: its current one")
    namespace: str = Field("lorot", description="where the objects are made")
    image: str = Field("lorot:latest", description="of a job that names none")
    images: tuple[str, ...] = Field(("*",), description="patterns of images that jobs may name")
    kind: Literal["auto", "jobset", "job"] = Field(
        "auto", description="auto: a JobSet for fixed gangs where the cluster has them, else an Indexed Job"
    )
    queue: str | None = Field(None, description="Kueue's LocalQueue; default: none, jobs start at once")
    data_claim: str | None = Field(None, description="PersistentVolumeClaim that is mounted, read-only, as /data")
    results_claim: str | None = Field(None, description="PersistentVolumeClaim that is mounted as /results")
    job_secret: str | None = Field(
        None, description="Secret whose keys are variables of every job, as MLFLOW_TRACKING_TOKEN; default: none"
    )
    service_account: str | None = Field(None, description="of the pods; default: the namespace's, without a token")
    priority_class: str | None = Field(None, description="of the pods; default: the cluster's")
    priority_classes: dict[Annotated[int, Field(ge=-100, le=100)], str] = Field(
        {}, description="of the pods of jobs with these priorities; other priorities than these and 0 are refused"
    )
    gpu: str = Field("nvidia.com/gpu", description="the resource that a GPU is counted by")
    rdma: str | None = Field(
        None, description="a resource that each pod of a job with GPUs on several machines asks one of, as rdma/hca"
    )


class BackendSettings(Section):
    """Where jobs may run."""

    local: LocalSettings = LocalSettings()
    docker: DockerSettings = DockerSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()


class LimitSettings(Section):
    """What one client may ask for."""

    body_bytes: int = Field(1_000_000, ge=1000, description="of a request")
    requests_per_minute: int = Field(600, ge=1, description="of one token, or one address; beyond it 429")
    looks_per_minute: int = Field(
        1200, ge=1, description="of one token, or one address: what the console's form asks while somebody types"
    )
    followers: int = Field(300, ge=1, description="open event streams, of all clients together")
    followers_each: int | None = Field(
        None, ge=1, description="of these, of one token, or one address; beyond it 429; default: five of six"
    )
    retries: int = Field(20, ge=0, description="largest retry budget that a job may have")
    jobs: int = Field(100_000, ge=1, description="jobs that wait or run; beyond it 429")
    failures_per_minute: int = Field(20, ge=1, description="wrong tokens from one address; beyond it 429")
    audit_bytes: int = Field(10_000_000, ge=10_000, description="of the audit log, before a new one is begun; 5 stay")


class ServiceSettings(Section):
    """The whole file, configs/service.yaml."""

    state: Path = Field(Path("service-state"), description="tokens, audit log, the service's own lock; no jobs")
    results: Path = Field(Path("runs/jobs"), description="a folder for each job, made here")
    data_roots: tuple[Path, ...] = Field(
        (Path("data"),), description="folders that jobs may read data from; a path outside of them is refused"
    )
    data_urls: tuple[Address, ...] = Field(
        (), description="addresses that jobs may read data below, as s3://bucket/sets; others are refused"
    )
    mounts: tuple[Path, ...] = Field((), description="host folders that jobs in containers may ask to see, read-only")
    secrets: Path | None = Field(None, description="folder with one file for each secret, which jobs name")
    tracking_uri: str | None = Field(None, description="MLflow; default: MLFLOW_TRACKING_URI, else sqlite in mlruns/")
    worker_tracking_uri: str | None = Field(
        None, description="the same server as containers reach it; default: tracking_uri"
    )
    browser_tracking_uri: Page | None = Field(
        None, description="the same server as the console's users reach it; default: tracking_uri"
    )
    experiment: str = Field("lorot", description="of jobs that name none")
    artifact_roots: tuple[str, ...] = Field(
        (),
        description="folders of this machine, or beginnings of addresses, where artifacts may lie besides object "
        "stores, the tracking server and the folder beside a sqlite database",
    )
    gpus: int | None = Field(None, ge=0, description="of this machine, for jobs that run on it; default: all")
    cpus: Annotated[float | None, Positive] = Field(None, description="of this machine; default: all cores")
    memory: Size | None = Field(
        None, description="of this machine, as 60GB, for jobs that name what they need; default: all, or a container's"
    )
    poll_s: float = Field(1.0, gt=0, le=60, description="between two looks at what runs")
    backends: BackendSettings = BackendSettings()
    limits: LimitSettings = LimitSettings()
    hosts: tuple[str, ...] = Field(
        (), description="names that clients call the service by, besides localhost; off loopback, if given: no others"
    )
    proxies: tuple[str, ...] = Field(
        (), description="addresses of reverse proxies, whose X-Forwarded-For and X-Forwarded-Proto are believed"
    )


def complete() -> type[ServiceSettings]:
    """`ServiceSettings` with a section for each backend there is: those that have none here bring their `Settings`."""
    own = {name: traits.module(name).Settings for name in traits.NAMES if name not in BackendSettings.model_fields}
    if not own:
        return ServiceSettings
    fields: dict[str, Any] = {name: (section, section()) for name, section in own.items()}
    backends = create_model(BackendSettings.__name__, __base__=BackendSettings, **fields)
    return create_model(ServiceSettings.__name__, __base__=ServiceSettings, backends=(backends, backends()))
