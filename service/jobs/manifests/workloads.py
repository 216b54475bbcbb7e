"""The objects of one attempt: a Job, an Indexed Job with its rendezvous, or a JobSet. Imports no torch."""

from typing import Any

from service.jobs.backends import Order
from service.jobs.manifests import kinds, pods
from service.jobs.nodes import PORT
from service.jobs.settings import KubernetesSettings

QUEUE = "kueue.x-k8s.io/queue-name"
JOBSETS = "jobset.x-k8s.io"
# What a cluster clears away by itself, should the service never come back to it.
_KEPT_S = 7 * 24 * 3600
# The service counts failures of whole attempts; within one, so often at most a node or a gang is started again.
_RESTARTS = 3
_LESS_THAN_ALL = "kueue.x-k8s.io/job-min-parallelism"
_AS_MANY = "kueue.x-k8s.io/job-completions-equal-parallelism"


def objects(order: Order, settings: KubernetesSettings, configuration: str, *, jobsets: bool) -> list[dict[str, Any]]:
    """Everything that an attempt is made of. The first owns the others: they go when it goes.

    Args:
        configuration: what job.yaml holds; not used by a container.
        jobsets: the cluster has JobSets.
    """
    spec = order.job.spec
    parts: list[Any]
    if spec.most_nodes == 1:
        parts = [_single(order, settings)]
    elif is_gang(order, settings) and jobsets:
        parts = [_job_set(order, settings)]
    else:
        parts = [_indexed(order, settings), _names(order, settings)]
        if meets(order):
            parts += [_door(order, settings), _rendezvous(order, settings)]
    if spec.kind != "container":
        parts.append(_configuration(order, settings, configuration))
    return [kinds.as_dict(part) for part in parts]


def is_gang(order: Order, settings: KubernetesSettings) -> bool:
    """Whether a JobSet is wanted: all nodes or none."""
    spec = order.job.spec
    return settings.kind != "job" and spec.fewest_nodes == spec.most_nodes > 1


def meets(order: Order) -> bool:
    """Whether the nodes need a rendezvous."""
    return order.job.spec.most_nodes > 1 and any(pods.RENDEZVOUS in word for word in order.command)


def owned(document: dict[str, Any], owner: dict[str, Any]) -> dict[str, Any]:
    """`document` as a part of `owner`, which is an object as the API server has returned it."""
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
    }
    return {**document, "metadata": {**document["metadata"], "ownerReferences": [reference]}}


def _metadata(
    order: Order, settings: KubernetesSettings, role: str, suffix: str = "", annotations: dict[str, str] | None = None
) -> kinds.Metadata:
    given = pods.labels(order, role)
    told = {pods.NAME: order.job.spec.name, **(annotations or {})}
    if role == "attempt":
        told[pods.NUMBER] = str(order.number)
        if settings.queue is not None:
            given[QUEUE] = settings.queue
    return kinds.Metadata(name=order.name + suffix, namespace=settings.namespace, labels=given, annotations=told)


def _suspended(settings: KubernetesSettings) -> bool | None:
    # Kueue lets it go when all of it fits.
    return True if settings.queue is not None else None


def _single(order: Order, settings: KubernetesSettings) -> kinds.BatchJob:
    return kinds.BatchJob(
        metadata=_metadata(order, settings, "attempt"),
        spec=kinds.BatchSpec(
            completions=1,
            parallelism=1,
            completion_mode="NonIndexed",
            # The service tries again, from the last checkpoint.
            backoff_limit=0,
            pod_replacement_policy="Failed",
            pod_failure_policy=pods.failures(order.job.spec),
            suspend=_suspended(settings),
            ttl_seconds_after_finished=_KEPT_S,
            template=pods.node(order, settings, meeting=None, subdomain=None),
        ),
    )


def _indexed(order: Order, settings: KubernetesSettings) -> kinds.BatchJob:
    spec = order.job.spec
    elastic = spec.fewest_nodes < spec.most_nodes
    admission = {}
    if elastic and settings.queue is not None:
        admission = {_LESS_THAN_ALL: str(spec.fewest_nodes), _AS_MANY: "true"}
    return kinds.BatchJob(
        metadata=_metadata(order, settings, "attempt", annotations=admission),
        spec=kinds.BatchSpec(
            completions=spec.most_nodes,
            parallelism=spec.most_nodes,
            completion_mode="Indexed",
            # A limit for all nodes together would let one bad host end the others.
            backoff_limit_per_index=min(_RESTARTS, spec.retries),
            max_failed_indexes=spec.most_nodes - spec.fewest_nodes,
            # A node that still runs and its successor would be one too many at the rendezvous.
            pod_replacement_policy="Failed",
            pod_failure_policy=pods.failures(spec),
            suspend=_suspended(settings),
            ttl_seconds_after_finished=_KEPT_S,
            template=pods.node(
                order, settings, meeting=f"{order.name}-rdzv" if meets(order) else None, subdomain=order.name
            ),
        ),
    )


def _names(order: Order, settings: KubernetesSettings) -> kinds.Service:
    """Gives each node a name, NAME-K.NAME, before it is ready: they have to meet to become ready."""
    selector = {pods.ATTEMPT: order.name, pods.ROLE: "node"}
    return kinds.Service(
        metadata=_metadata(order, settings, "part"),
        spec=kinds.ServiceSpec(cluster_ip="None", publish_not_ready_addresses=True, selector=selector),
    )


def _door(order: Order, settings: KubernetesSettings) -> kinds.Service:
    selector = {pods.ATTEMPT: order.name, pods.ROLE: "rendezvous"}
    return kinds.Service(
        metadata=_metadata(order, settings, "part", "-rdzv"),
        spec=kinds.ServiceSpec(selector=selector, ports=(kinds.ServicePort(name="rendezvous", port=PORT),)),
    )


def _rendezvous(order: Order, settings: KubernetesSettings) -> kinds.BatchJob:
    return kinds.BatchJob(
        metadata=_metadata(order, settings, "part", "-rdzv"),
        spec=_one_pod(pods.rendezvous(order, settings)),
    )


def _one_pod(template: kinds.PodTemplate) -> kinds.BatchSpec:
    return kinds.BatchSpec(
        completions=1,
        parallelism=1,
        # In a JobSet only the pods of an Indexed Job have names that others can look up.
        completion_mode="Indexed",
        backoff_limit=_RESTARTS,
        pod_replacement_policy="Failed",
        pod_failure_policy=kinds.PodFailurePolicy(
            rules=(
                kinds.FailureRule(
                    action="Ignore", on_pod_conditions=(kinds.PodCondition(type="DisruptionTarget", status="True"),)
                ),
            )
        ),
        template=template,
    )


def _job_set(order: Order, settings: KubernetesSettings) -> kinds.JobSet:
    spec = order.job.spec
    # JobSet names its pods SET-PART-JOB-POD, in the set's own subdomain.
    meeting = f"{order.name}-rdzv-0-0.{order.name}" if meets(order) else None
    nodes = kinds.BatchSpec(
        completions=spec.most_nodes,
        parallelism=spec.most_nodes,
        completion_mode="Indexed",
        # The set starts all of them again.
        backoff_limit=0,
        pod_replacement_policy="Failed",
        pod_failure_policy=pods.failures(spec),
        template=pods.node(order, settings, meeting=meeting, subdomain=None),
    )
    parts = [kinds.ReplicatedJob(name="node", replicas=1, template=kinds.BatchTemplate(spec=nodes))]
    if meeting is not None:
        store = kinds.BatchTemplate(spec=_one_pod(pods.rendezvous(order, settings)))
        parts.insert(0, kinds.ReplicatedJob(name="rdzv", replicas=1, template=store))
    return kinds.JobSet(
        metadata=_metadata(order, settings, "attempt"),
        spec=kinds.JobSetSpec(
            suspend=_suspended(settings),
            ttl_seconds_after_finished=_KEPT_S,
            network=kinds.Network(enable_dns_hostnames=True, publish_not_ready_addresses=True),
            success_policy=kinds.SetSuccessPolicy(operator="All", target_replicated_jobs=("node",)),
            failure_policy=kinds.SetFailurePolicy(
                max_restarts=min(_RESTARTS, spec.retries),
                # No new pod before every old one is gone: two gangs would share the results.
                restart_strategy="BlockingRecreate",
                rules=(
                    kinds.SetFailureRule(
                        name="final", action="FailJobSet", on_job_failure_reasons=("PodFailurePolicy",)
                    ),
                ),
            ),
            replicated_jobs=parts,
        ),
    )


def _configuration(order: Order, settings: KubernetesSettings, text: str) -> kinds.ConfigMap:
    name = pods.CONFIGURATION.rpartition("/")[2]
    return kinds.ConfigMap(metadata=_metadata(order, settings, "part"), data={name: text})
