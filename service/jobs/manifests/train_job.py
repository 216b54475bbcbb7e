"""A job as Kubeflow's TrainJob, for clusters where that is the way in. An export: the service starts and follows none.

So it is nobody's attempt: it carries neither labels nor variables of one, and its workers open a run of their own.

Its torch runtime tells torchrun by PET_* variables who takes part. It has no place for a rendezvous outside of the
nodes, so an elastic job is none. API: trainer.kubeflow.org/v1alpha1, which moves; as Kubeflow Trainer 2.3 has it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import ConfigError
from service.jobs.backends import Order
from service.jobs.manifests import kinds, pods
from service.jobs.manifests.workloads import QUEUE
from service.jobs.settings import KubernetesSettings
from service.jobs.torchrun import WORKER

# The runtime in deploy/kubeflow, and the name of its pods and their container.
_RUNTIME = "lorot"
_PART = "node"
# Variables by which the service tells a worker whose attempt it is; no user may set such a one.
_OF_A_JOB = "LOROT_"
# The policies of the network ask for it. By those of an attempt the service would take it for one of its own.
_LABELS = {"app.kubernetes.io/name": "lorot-job"}


@dataclass(frozen=True, kw_only=True)
class _Reference:
    name: str
    api_group: str = "trainer.kubeflow.org"
    kind: str = "TrainingRuntime"


@dataclass(frozen=True, kw_only=True)
class _Trainer:
    image: str
    command: Sequence[str]
    env: Sequence[kinds.Variable]
    num_nodes: int
    num_proc_per_node: int
    resources_per_node: kinds.Amounts


def train_job(order: Order, settings: KubernetesSettings, configuration: str) -> list[dict[str, Any]]:
    """A TrainJob and the ConfigMap with its configuration.

    Args:
        order: of a job that was not handed in; both are called as its attempt is, its folder as `order.job.id` says.

    Raises:
        ConfigError: the job is elastic, has a priority, or needs variables of a whole Secret: the API has no place for
            these.
    """
    spec = order.job.spec
    if spec.fewest_nodes < spec.most_nodes:
        raise ConfigError(
            f"nodes {spec.nodes}: a TrainJob has a fixed number of nodes; give one number, or submit to this service's "
            "kubernetes backend, which makes elastic jobs an Indexed Job"
        )
    if settings.job_secret is not None:
        raise ConfigError(
            f"job_secret {settings.job_secret}: a TrainJob takes no whole Secret; name the job's own in `secrets`"
        )
    if spec.priority:
        raise ConfigError(
            f"priority: {spec.priority} has no place in a TrainJob; give 0, and name a priorityClassName in the "
            "TrainingRuntime (deploy/kubeflow/training-runtime.yaml)"
        )
    workers = spec.workers or max(1, spec.resources.gpus)
    given = [variable for variable in pods.variables(order, settings) if not variable.name.startswith(_OF_A_JOB)]
    trainer = _Trainer(
        image=spec.image or settings.image,
        command=_command(order),
        env=[*given, kinds.Variable(name="TORCH_DISABLE_SHARE_RDZV_TCP_STORE", value="1")],
        num_nodes=spec.most_nodes,
        num_proc_per_node=workers,
        resources_per_node=pods.amounts(spec, settings),
    )
    labels = _LABELS | ({QUEUE: settings.queue} if settings.queue is not None else {})
    about = kinds.Metadata(
        name=order.name, namespace=settings.namespace, labels=labels, annotations={pods.NAME: spec.name}
    )
    job: dict[str, Any] = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": kinds.as_dict(about),
        "spec": {
            "runtimeRef": kinds.as_dict(_Reference(name=_RUNTIME)),
            "trainer": kinds.as_dict(trainer),
            "runtimePatches": [_patch(order, settings)],
        },
    }
    if settings.queue is not None:
        job["spec"]["suspend"] = True
    found = [job]
    if spec.kind != "container":
        part = kinds.Metadata(name=order.name, namespace=settings.namespace, labels=_LABELS)
        name = pods.CONFIGURATION.rpartition("/")[2]
        found.append(kinds.as_dict(kinds.ConfigMap(metadata=part, data={name: configuration})))
    return found


def _command(order: Order) -> list[str]:
    spec = order.job.spec
    if spec.kind == "train" and spec.most_nodes > 1:
        return ["torchrun", "-m", WORKER, pods.CONFIGURATION, "--resume"]
    if spec.most_nodes > 1 and any(pods.RENDEZVOUS in word for word in order.command):
        raise ConfigError(f"kind {spec.kind}: as a TrainJob it can have one node; give nodes=1")
    node = pods.node(order, KubernetesSettings(), meeting=None, subdomain=None)
    return list(node.spec.containers[0].command)


def _patch(order: Order, settings: KubernetesSettings) -> Mapping[str, Any]:
    """What the runtime's template lacks: volumes, identity, grace."""
    template = kinds.as_dict(pods.node(order, settings, meeting=None, subdomain=None))
    pod, main = template["spec"], template["spec"]["containers"][0]
    kept = ("securityContext", "serviceAccountName", "terminationGracePeriodSeconds", "tolerations", "volumes")
    container = {key: main[key] for key in ("securityContext", "volumeMounts")}
    spec = {key: pod[key] for key in kept if key in pod}
    patched = {"metadata": {"labels": _LABELS}, "spec": spec}
    patched["spec"]["containers"] = [{"name": _PART, **container}]
    jobs = [{"name": _PART, "template": {"spec": {"template": patched}}}]
    return {"manager": "lorot.dev/service", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}}}
