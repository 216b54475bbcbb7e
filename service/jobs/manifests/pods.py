"""The pod of one node: what runs, as whom, with which amounts, volumes and variables. Imports no torch."""

import math
from collections.abc import Mapping, Sequence

from service.errors import REQUEUE
from service.jobs.backends import Order
from service.jobs.backends.kubernetes import TRAITS
from service.jobs.manifests import kinds
from service.jobs.nodes import PORT
from service.jobs.settings import KubernetesSettings
from service.jobs.spec import JobSpec, Resources

JOB = "lorot.dev/job"
ATTEMPT = "lorot.dev/attempt"
# What an object is to its attempt: "attempt" owns all others; "node", "rendezvous" are pods; "part" is anything else.
ROLE = "lorot.dev/role"
NAME = "lorot.dev/name"
NUMBER = "lorot.dev/number"
MAIN = "main"
# Where `service.jobs.orders` says that a job in a container sees its folder and leaves its outputs.
FOLDER = "/job"
RESULTS = "/results"
DATA = "/data"
# The configuration comes from a ConfigMap: the service need not see the volume that results go to.
CONFIGURATION = "/etc/lorot/job.yaml"
RENDEZVOUS = "{rendezvous}"
# Key of the Secret that a job names. The service's own Secrets have no such key, so that no job can name those.
SECRET_KEY = "value"

# Trying again does not mend these (service.errors.EXIT_CODES).
_FINAL = (2, 3, 4, 5)
_USER = 1000
# From the end of a job's own grace to the kill.
_MARGIN_S = 10
# Of a node's first container, which waits for the rendezvous: images can be large, and clusters busy.
_PATIENCE_S = 1800
# A name that does not resolve yet is waited for as well, which `lorot train` takes for a mistake.
_WAIT = """
import socket, sys, time
host, port, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
deadline = time.monotonic() + patience
while True:
    try:
        socket.create_connection((host, port), 3).close()
        break
    except OSError as error:
        if time.monotonic() > deadline:
            sys.exit(f"no rendezvous at {host}:{port} for {patience:.0f} s: {error}")
        time.sleep(1)
"""


def labels(order: Order, role: str) -> dict[str, str]:
    """By which everything of an attempt is found."""
    return {
        "app.kubernetes.io/name": "lorot-job",
        "app.kubernetes.io/managed-by": "lorot",
        JOB: order.job.id,
        ATTEMPT: order.name,
        ROLE: role,
    }


def node(
    order: Order, settings: KubernetesSettings, *, meeting: str | None, subdomain: str | None
) -> kinds.PodTemplate:
    """A pod that runs the order's command.

    Args:
        meeting: host of the rendezvous, which is waited for; None: there is none.
        subdomain: of the pods' names; None: they have none.
    """
    spec = order.job.spec
    image = spec.image or settings.image
    main = kinds.Container(
        name=MAIN,
        image=image,
        command=_command(order, meeting),
        # Only the volumes can be written to.
        working_dir=None if spec.kind == "container" else "/tmp",
        env=variables(order, settings),
        env_from=_shared(settings),
        resources=amounts(spec, settings),
        security_context=_confined(),
        volume_mounts=mounts(order, settings),
    )
    first = []
    if meeting is not None:
        first = [
            kinds.Container(
                name="await-rendezvous",
                # A user's image need not have Python.
                image=settings.image if spec.kind == "container" else image,
                command=("python3", "-c", _WAIT, meeting, str(PORT), str(_PATIENCE_S)),
                resources=_little("64Mi"),
                security_context=_confined(),
            )
        ]
    return kinds.PodTemplate(
        metadata=kinds.Metadata(labels=labels(order, "node"), annotations={NAME: spec.name}),
        spec=kinds.PodSpec(
            restart_policy="Never",
            init_containers=first,
            containers=[main],
            security_context=_identity(),
            termination_grace_period_seconds=math.ceil(spec.grace_s) + _MARGIN_S,
            service_account_name=settings.service_account,
            priority_class_name=_priority_class(spec, settings),
            subdomain=subdomain,
            tolerations=_tolerations(spec.resources, settings),
            volumes=volumes(order, settings),
        ),
    )


def rendezvous(order: Order, settings: KubernetesSettings) -> kinds.PodTemplate:
    """The pod where the nodes meet. It is none of them, so that losing one leaves the others a place."""
    spec = order.job.spec
    main = kinds.Container(
        name=MAIN,
        image=settings.image if spec.kind == "container" else spec.image or settings.image,
        command=("lorot", "rendezvous", "--port", str(PORT)),
        working_dir="/tmp",
        env=(kinds.Variable(name="HOME", value="/tmp"),),
        ports=(kinds.ContainerPort(name="rendezvous", container_port=PORT),),
        readiness_probe=kinds.Probe(tcp_socket=kinds.TcpSocket(port=PORT), period_seconds=2),
        resources=_little("1Gi"),
        security_context=_confined(),
        volume_mounts=(kinds.Mount(name="tmp", mount_path="/tmp"),),
    )
    return kinds.PodTemplate(
        metadata=kinds.Metadata(labels=labels(order, "rendezvous")),
        spec=kinds.PodSpec(
            restart_policy="Never",
            containers=[main],
            security_context=_identity(),
            termination_grace_period_seconds=5,
            service_account_name=settings.service_account,
            priority_class_name=_priority_class(spec, settings),
            volumes=(kinds.Volume(name="tmp", empty_dir=kinds.EmptyDir(size_limit="1Gi")),),
        ),
    )


def failures(spec: JobSpec) -> kinds.PodFailurePolicy:
    """What the end of a pod means: pre-emption and a request to stop count as nothing, what no retry mends ends all."""
    rules = [
        kinds.FailureRule(
            action="Ignore", on_pod_conditions=(kinds.PodCondition(type="DisruptionTarget", status="True"),)
        )
    ]
    if spec.kind != "container":
        # Of a foreign program nobody knows what its exit codes mean.
        rules += [_on("Ignore", (REQUEUE,)), _on("FailJob", _FINAL)]
    return kinds.PodFailurePolicy(rules=rules)


def _on(action: str, codes: Sequence[int]) -> kinds.FailureRule:
    return kinds.FailureRule(
        action=action, on_exit_codes=kinds.ExitCodes(container_name=MAIN, operator="In", values=codes)
    )


def amount(size: str) -> str:
    """An amount of memory as Kubernetes writes it: 8GB is 8G, 512MiB is 512Mi, 4kiB is 4Ki."""
    text = size.removesuffix("B")
    return text.replace("ki", "Ki")


def amounts(spec: JobSpec, settings: KubernetesSettings) -> kinds.Amounts:
    """What a node asks for is also the most that it gets. /dev/shm counts as memory."""
    resources = spec.resources
    wanted = {"cpu": f"{resources.cpus:g}"}
    if resources.memory is not None:
        wanted["memory"] = amount(resources.memory)
    if resources.gpus:
        wanted[settings.gpu] = str(resources.gpus)
    if settings.rdma is not None and _meets_by_gpu(spec):
        wanted[settings.rdma] = "1"
    return kinds.Amounts(requests=wanted, limits=wanted)


def variables(order: Order, settings: KubernetesSettings) -> list[kinds.Variable]:
    """The environment of a node; secrets as references."""
    spec = order.job.spec
    found: dict[str, str] = {}
    if spec.kind != "container":
        found |= {"HOME": "/tmp", "MPLCONFIGDIR": "/tmp/matplotlib", "PYTHONPYCACHEPREFIX": "/tmp/pycache"}
    if _meets_by_gpu(spec):
        found |= _network(settings)
    found |= order.environment
    given = [kinds.Variable(name=name, value=literal(value)) for name, value in found.items()]
    for name, secret in spec.secrets.items():
        key = kinds.SecretKey(name=secret, key=SECRET_KEY)
        given.append(kinds.Variable(name=name, value_from=kinds.Source(secret_key_ref=key)))
    return given


def volumes(order: Order, settings: KubernetesSettings) -> list[kinds.Volume]:
    """Shared memory, scratch, and the claims for data and results."""
    shm = kinds.EmptyDir(medium="Memory", size_limit=amount(order.job.spec.resources.shm))
    found = [
        kinds.Volume(name="shm", empty_dir=shm),
        kinds.Volume(name="tmp", empty_dir=kinds.EmptyDir(size_limit=f"{TRAITS.tmp_gib}Gi")),
    ]
    if settings.results_claim is not None:
        claim = kinds.Claim(claim_name=settings.results_claim)
        found.append(kinds.Volume(name="results", persistent_volume_claim=claim))
    else:
        found.append(kinds.Volume(name="results", empty_dir=kinds.EmptyDir()))
    if settings.data_claim is not None:
        claim = kinds.Claim(claim_name=settings.data_claim, read_only=True)
        found.append(kinds.Volume(name="data", persistent_volume_claim=claim))
    if order.job.spec.kind != "container":
        found.append(kinds.Volume(name="configuration", config_map=kinds.Named(name=order.name)))
    return found


def mounts(order: Order, settings: KubernetesSettings) -> list[kinds.Mount]:
    """Where a node sees its volumes. Of the results, a job sees its run folder and its outputs.

    What else its folder holds is the service's: what the job put there, the service would take for its own.
    """
    own = order.job.id
    found = [
        kinds.Mount(name="shm", mount_path="/dev/shm"),
        kinds.Mount(name="tmp", mount_path="/tmp"),
        kinds.Mount(name="results", mount_path=f"{FOLDER}/run", sub_path=f"{own}/run"),
        kinds.Mount(name="results", mount_path=RESULTS, sub_path=f"{own}/outputs"),
    ]
    if settings.data_claim is not None:
        found.append(kinds.Mount(name="data", mount_path=DATA, read_only=True))
    if order.job.spec.kind != "container":
        folder = CONFIGURATION.rpartition("/")[0]
        found.append(kinds.Mount(name="configuration", mount_path=folder, read_only=True))
    return found


def literal(text: str) -> str:
    """Such that Kubernetes, which puts variables in place of $(NAME) in commands and values, leaves it as it is."""
    return text.replace("$", "$$")


def _command(order: Order, meeting: str | None) -> list[str]:
    here = {f"{FOLDER}/job.yaml": CONFIGURATION}
    command = [literal(here.get(word, word)) for word in order.command]
    if meeting is not None:
        command = [word.replace(RENDEZVOUS, f"{meeting}:{PORT}") for word in command]
    spec = order.job.spec
    if spec.kind != "container" and spec.most_nodes == 1 and "--resume" not in command:
        # A pod that was pre-empted is made again with the same command. Without a checkpoint this begins at step 0.
        command.append("--resume")
    return command


def _meets_by_gpu(spec: JobSpec) -> bool:
    """Whether GPUs of several nodes speak with one another."""
    return spec.most_nodes > 1 and spec.resources.gpus > 0


def _network(settings: KubernetesSettings) -> Mapping[str, str]:
    if settings.rdma is None:
        return {"NCCL_IB_DISABLE": "1"}
    # Without the device NCCL would fall back to TCP in silence, at a tenth of the speed.
    return {"NCCL_NET": "IB", "NCCL_IB_DISABLE": "0"}


def _shared(settings: KubernetesSettings) -> list[kinds.Variables]:
    if settings.job_secret is None:
        return []
    return [kinds.Variables(secret_ref=kinds.Named(name=settings.job_secret))]


def _priority_class(spec: JobSpec, settings: KubernetesSettings) -> str | None:
    # Kueue orders its queue by the class of the pods, too.
    return settings.priority_classes.get(spec.priority, settings.priority_class)


def _tolerations(resources: Resources, settings: KubernetesSettings) -> list[kinds.Toleration]:
    return [kinds.Toleration(key=settings.gpu, operator="Exists", effect="NoSchedule")] if resources.gpus else []


def _little(memory: str) -> kinds.Amounts:
    return kinds.Amounts(requests={"cpu": "100m", "memory": memory}, limits={"cpu": "1", "memory": memory})


def _confined() -> kinds.ContainerSecurity:
    return kinds.ContainerSecurity(
        allow_privilege_escalation=False,
        read_only_root_filesystem=True,
        capabilities=kinds.Capabilities(drop=("ALL",)),
    )


def _identity() -> kinds.PodSecurity:
    # An image whose user is a name is refused by runAsNonRoot unless a number is given here.
    return kinds.PodSecurity(
        run_as_non_root=True,
        run_as_user=_USER,
        run_as_group=_USER,
        fs_group=_USER,
        fs_group_change_policy="OnRootMismatch",
        seccomp_profile=kinds.SeccompProfile(type="RuntimeDefault"),
    )
