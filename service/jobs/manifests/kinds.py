"""The Kubernetes kinds that jobs are made of, with the fields that are used and no others.

The official client has all of them, and takes two seconds and 80 MB to load, which `lorot submit --dry-run` should not.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

# Where a name is not the same words in camel case.
_SPELLED = {"cluster_ip": "clusterIP", "enable_dns_hostnames": "enableDNSHostnames"}


def as_dict(value: Any) -> Any:
    """As the API server takes it: camel case, and without what was not given; an empty section stays, as emptyDir."""
    if is_dataclass(value):
        found = {_key(item.name): getattr(value, item.name) for item in fields(value)}
        return {key: as_dict(inner) for key, inner in found.items() if not _is_left_out(inner)}
    if isinstance(value, Mapping):
        return {key: as_dict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_dict(inner) for inner in value]
    return value


def _key(name: str) -> str:
    return _SPELLED.get(name) or re.sub(r"_(.)", lambda found: found[1].upper(), name)


def _is_left_out(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping | list | tuple) and not value)


@dataclass(frozen=True, kw_only=True)
class Metadata:
    name: str | None = None
    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SecretKey:
    name: str
    key: str


@dataclass(frozen=True, kw_only=True)
class Source:
    secret_key_ref: SecretKey


@dataclass(frozen=True, kw_only=True)
class Named:
    name: str


@dataclass(frozen=True, kw_only=True)
class Variables:
    """All keys of a Secret."""

    secret_ref: Named


@dataclass(frozen=True, kw_only=True)
class Variable:
    name: str
    value: str | None = None
    value_from: Source | None = None


@dataclass(frozen=True, kw_only=True)
class Amounts:
    requests: Mapping[str, str]
    limits: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    drop: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class ContainerSecurity:
    allow_privilege_escalation: bool
    read_only_root_filesystem: bool
    capabilities: Capabilities


@dataclass(frozen=True, kw_only=True)
class Mount:
    name: str
    mount_path: str
    sub_path: str | None = None
    read_only: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ContainerPort:
    name: str
    container_port: int
    protocol: str = "TCP"


@dataclass(frozen=True, kw_only=True)
class TcpSocket:
    port: int


@dataclass(frozen=True, kw_only=True)
class Probe:
    tcp_socket: TcpSocket
    period_seconds: int


@dataclass(frozen=True, kw_only=True)
class Container:
    name: str
    image: str
    command: Sequence[str]
    resources: Amounts
    security_context: ContainerSecurity
    working_dir: str | None = None
    env: Sequence[Variable] = ()
    env_from: Sequence[Variables] = ()
    ports: Sequence[ContainerPort] = ()
    readiness_probe: Probe | None = None
    volume_mounts: Sequence[Mount] = ()


@dataclass(frozen=True, kw_only=True)
class EmptyDir:
    medium: str | None = None
    size_limit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    claim_name: str
    read_only: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Volume:
    name: str
    empty_dir: EmptyDir | None = None
    persistent_volume_claim: Claim | None = None
    config_map: Named | None = None


@dataclass(frozen=True, kw_only=True)
class SeccompProfile:
    type: str


@dataclass(frozen=True, kw_only=True)
class PodSecurity:
    run_as_non_root: bool
    run_as_user: int
    run_as_group: int
    fs_group: int
    fs_group_change_policy: str
    seccomp_profile: SeccompProfile


@dataclass(frozen=True, kw_only=True)
class Toleration:
    key: str
    operator: str
    effect: str


@dataclass(frozen=True, kw_only=True)
class PodSpec:
    restart_policy: str
    containers: Sequence[Container]
    security_context: PodSecurity
    termination_grace_period_seconds: int
    automount_service_account_token: bool = False
    enable_service_links: bool = False
    service_account_name: str | None = None
    priority_class_name: str | None = None
    subdomain: str | None = None
    init_containers: Sequence[Container] = ()
    tolerations: Sequence[Toleration] = ()
    volumes: Sequence[Volume] = ()


@dataclass(frozen=True, kw_only=True)
class PodTemplate:
    metadata: Metadata
    spec: PodSpec


@dataclass(frozen=True, kw_only=True)
class ExitCodes:
    container_name: str
    operator: str
    values: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class PodCondition:
    type: str
    status: str


@dataclass(frozen=True, kw_only=True)
class FailureRule:
    action: str
    on_exit_codes: ExitCodes | None = None
    on_pod_conditions: Sequence[PodCondition] = ()


@dataclass(frozen=True, kw_only=True)
class PodFailurePolicy:
    rules: Sequence[FailureRule]


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """Of a batch/v1 Job."""

    template: PodTemplate
    completions: int
    parallelism: int
    completion_mode: str
    pod_replacement_policy: str
    pod_failure_policy: PodFailurePolicy
    backoff_limit: int | None = None
    backoff_limit_per_index: int | None = None
    max_failed_indexes: int | None = None
    suspend: bool | None = None
    ttl_seconds_after_finished: int | None = None


@dataclass(frozen=True, kw_only=True)
class BatchTemplate:
    spec: BatchSpec
    metadata: Metadata | None = None


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    api_version: str = "batch/v1"
    kind: str = "Job"
    metadata: Metadata
    spec: BatchSpec


@dataclass(frozen=True, kw_only=True)
class ServicePort:
    name: str
    port: int


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    selector: Mapping[str, str]
    cluster_ip: str | None = None
    publish_not_ready_addresses: bool | None = None
    ports: Sequence[ServicePort] = ()


@dataclass(frozen=True, kw_only=True)
class Service:
    api_version: str = "v1"
    kind: str = "Service"
    metadata: Metadata
    spec: ServiceSpec


@dataclass(frozen=True, kw_only=True)
class ConfigMap:
    api_version: str = "v1"
    kind: str = "ConfigMap"
    metadata: Metadata
    data: Mapping[str, str]
    immutable: bool = True


@dataclass(frozen=True, kw_only=True)
class ReplicatedJob:
    name: str
    replicas: int
    template: BatchTemplate


@dataclass(frozen=True, kw_only=True)
class Network:
    enable_dns_hostnames: bool
    publish_not_ready_addresses: bool


@dataclass(frozen=True, kw_only=True)
class SetFailureRule:
    name: str
    action: str
    on_job_failure_reasons: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class SetFailurePolicy:
    max_restarts: int
    restart_strategy: str
    rules: Sequence[SetFailureRule] = ()


@dataclass(frozen=True, kw_only=True)
class SetSuccessPolicy:
    operator: str
    target_replicated_jobs: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class JobSetSpec:
    replicated_jobs: Sequence[ReplicatedJob]
    network: Network
    failure_policy: SetFailurePolicy
    success_policy: SetSuccessPolicy
    suspend: bool | None = None
    ttl_seconds_after_finished: int | None = None


@dataclass(frozen=True, kw_only=True)
class JobSet:
    api_version: str = "jobset.x-k8s.io/v1alpha2"
    kind: str = "JobSet"
    metadata: Metadata
    spec: JobSetSpec
