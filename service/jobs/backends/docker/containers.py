"""What a Docker engine is asked to make for a job: containers as its HTTP API takes them. Imports no torch.

Every container runs as an ordinary user without capabilities, cannot gain any, sees its image read-only, and sees of
the host only the job's own folders, the data roots and what the operator has allowed.
"""

import fnmatch
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from service import store
from service.errors import ConfigError
from service.jobs import orders
from service.jobs.backends import Order
from service.jobs.backends.docker import TRAITS
from service.jobs.job import Job
from service.jobs.nodes import PORT
from service.jobs.settings import DockerSettings, ServiceSettings
from service.jobs.spec import JobSpec, num_bytes

# Labels, by which everything is found again.
JOB, ATTEMPT, NODE = "lorot.job", "lorot.attempt", "lorot.node"
FOLDER, FEWEST = "lorot.folder", "lorot.fewest"
# In a node's place.
MEETING_POINT = "rdzv"

# Where engines listen, and whoever writes is root on the host; and where they keep all containers.
_ENGINES = (
    *(Path("/run/docker.sock"), Path("/run/containerd/containerd.sock"), Path("/run/podman/podman.sock")),
    *(Path("/var/lib/docker"), Path("/var/lib/containerd")),
)
# Whatever lies here tells of the host, or changes it.
_SYSTEM = (Path("/proc"), Path("/sys"), Path("/dev"), Path("/boot"), Path("/etc"))
# DeepSpeed and Numba load what they compile there, so it cannot be noexec. It counts as the container's memory.
_TMP = f"rw,exec,nosuid,nodev,size={TRAITS.tmp_gib}g,mode=1777"
_LOG = {"Type": "json-file", "Config": {"max-size": "50m", "max-file": "2"}}


def image_of(spec: JobSpec, settings: DockerSettings) -> str:
    """The image of a job's containers."""
    return spec.image or settings.image


def check(job: Job, settings: ServiceSettings) -> None:
    """Refuse what no engine is to do for this job; raises ConfigError. Asks no engine."""
    spec, docker = job.spec, settings.backends.docker
    image = image_of(spec, docker)
    if image != docker.image and not _is_allowed(image, docker.images):
        raise ConfigError(
            f"image {image!r} is not among those that jobs may run here: {', '.join(docker.images) or 'none'}; the "
            f"service's own is {docker.image}"
        )
    user_of(docker)
    if (docker.network or "").partition(":")[0] in ("host", "container", "none"):
        raise ConfigError(
            f"backends.docker.network={docker.network}: containers join a network of the engine's own; make one with "
            "`docker network create lorot`, and write its name"
        )
    for path in [*settings.data_roots, *map(Path, spec.mounts)]:
        _refuse_if_dangerous(path, settings)
    for path in map(Path, spec.mounts):
        _refuse_if_not_allowed(path, settings)
    orders.secret_values(spec, settings)
    if spec.kind != "container":
        _refuse_unreachable_record(settings)


def user_of(settings: DockerSettings) -> tuple[int, int]:
    """User and group number of containers; raises ConfigError for root's."""
    found = re.fullmatch(r"(\d+):(\d+)", settings.user)
    if found is None or not int(found[1]) or not int(found[2]):
        raise ConfigError(
            f"backends.docker.user={settings.user}: write UID:GID of an ordinary user, as 1000:1000; containers never "
            "run as root"
        )
    return int(found[1]), int(found[2])


def meets(order: Order) -> bool:
    """Whether its nodes ask for a rendezvous."""
    return any(orders.RENDEZVOUS in part for part in [*order.command, *order.environment.values()])


def has_own_network(order: Order) -> bool:
    """Whether its nodes talk to each other."""
    return order.job.spec.most_nodes > 1 or meets(order)


def prepare(order: Order, settings: DockerSettings) -> None:
    """Make the folders that containers write to and give them to their user; raises ConfigError where it may not.

    Nothing else of the job's folder can be written from inside, so whatever runs there cannot lead the service astray.
    """
    user, group = user_of(settings)
    (order.folder / orders.ATTEMPTS / str(order.number)).mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in (orders.RUN, orders.OUTPUTS):
        folder = order.folder / name
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat(follow_symlinks=False)
        if (owner.st_uid, owner.st_gid) == (user, group):
            continue
        try:
            os.chown(folder, user, group, follow_symlinks=False)
        except OSError:
            raise ConfigError(
                f"{folder}: containers run as {user}:{group} and could not write here; set backends.docker.user to "
                f"{os.getuid()}:{os.getgid()}, this service's own, or run the service as root"
            ) from None


def container(order: Order, settings: ServiceSettings, node: int | None) -> dict[str, Any]:
    """One container, as the body of the engine's `POST /containers/create`.

    Args:
        node: from 0; None for the rendezvous, which gets neither data nor results nor secrets.
    """
    spec, docker = order.job.spec, settings.backends.docker
    user, group = user_of(docker)
    if node is None:
        command: tuple[str, ...] = ("lorot", "rendezvous", "--port", str(PORT))
        variables: dict[str, str] = {}
        limits: dict[str, Any] = {"NanoCpus": 1_000_000_000, "Memory": 2 * 10**9, "MemorySwap": 2 * 10**9}
    else:
        where = f"{order.name}-{MEETING_POINT}:{PORT}"
        command = tuple(part.replace(orders.RENDEZVOUS, where) for part in order.command)
        variables = {name: value.replace(orders.RENDEZVOUS, where) for name, value in order.environment.items()}
        variables |= {"LOROT_NODE": str(node), "LOROT_NODES": str(spec.most_nodes)}
        variables |= orders.secret_values(spec, settings)
        limits = _limits(order, node)
    own = order.name if has_own_network(order) else None
    # The rootfs is read-only, and this user may be in no list of users.
    threads = max(1, int(spec.resources.cpus / (spec.workers or max(1, spec.resources.gpus))))
    variables = {"HOME": "/tmp", "USER": "lorot", "OMP_NUM_THREADS": str(threads), **variables, **_visible(order, node)}
    labels = {
        JOB: order.job.id,
        ATTEMPT: order.name,
        NODE: MEETING_POINT if node is None else str(node),
        FOLDER: str(order.folder.absolute()),
        FEWEST: str(spec.fewest_nodes),
    }
    body: dict[str, Any] = {
        # Of a foreign image only the files are used: the rendezvous is the service's own program.
        "Image": docker.image if node is None and spec.kind == "container" else image_of(spec, docker),
        # As entry point, so that the image's own is not put before it.
        "Entrypoint": [command[0]],
        "Cmd": list(command[1:]),
        "User": f"{user}:{group}",
        "Env": [f"{name}={value}" for name, value in variables.items()],
        "Labels": labels,
        "StopSignal": "SIGTERM",
        # Of use when the engine itself is stopped.
        "StopTimeout": math.ceil(spec.grace_s),
        "HostConfig": {
            **limits,
            "NetworkMode": own or docker.network or "bridge",
            "PidsLimit": docker.pids,
            "Init": True,
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges:true"],
            "IpcMode": "private",
            "Tmpfs": {"/tmp": _TMP},
            "Mounts": list(_mounts(order, settings, with_data=node is not None)),
            "LogConfig": _LOG,
            # The service starts jobs again, with --resume and within their budget; the engine never does.
            "RestartPolicy": {"Name": "no"},
        },
    }
    if spec.kind != "container":
        body["WorkingDir"] = "/tmp" if node is None else "/job"
    return body


def _limits(order: Order, node: int) -> dict[str, Any]:
    """What a node may use."""
    spec = order.job.spec
    limits: dict[str, Any] = {
        "NanoCpus": round(spec.resources.cpus * 1e9),
        "ShmSize": num_bytes(spec.resources.shm),
    }
    if spec.resources.memory is not None:
        # The same: no swap on top of it.
        limits["Memory"] = limits["MemorySwap"] = num_bytes(spec.resources.memory)
    if spec.resources.gpus:
        limits["DeviceRequests"] = [{"Driver": "", "DeviceIDs": _gpus(order, node), "Capabilities": [["gpu"]]}]
    return limits


def _visible(order: Order, node: int | None) -> dict[str, str]:
    """The variables by which images of CUDA ask for GPUs, whatever the image itself says: those of the node alone."""
    if node is None or not order.job.spec.resources.gpus:
        return {"NVIDIA_VISIBLE_DEVICES": "void", "CUDA_VISIBLE_DEVICES": ""}
    names = _gpus(order, node)
    # Inside they are counted from 0.
    return {
        "NVIDIA_VISIBLE_DEVICES": ",".join(names),
        "CUDA_VISIBLE_DEVICES": ",".join(str(index) for index in range(len(names))),
    }


def _gpus(order: Order, node: int) -> list[str]:
    """A node's share of the attempt's GPUs, by name: a mere number would mean the first ones for every container."""
    count = order.job.spec.resources.gpus
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else None
    share = order.gpus[node * count : (node + 1) * count]
    if len(share) < count:
        raise ConfigError(f"{order.name}: a node needs {count} GPUs and was given {len(share)}")
    return [str(index) if names is None else names[index].strip() for index in share]


def _mounts(order: Order, settings: ServiceSettings, with_data: bool) -> Iterator[dict[str, Any]]:
    spec, folder = order.job.spec, order.folder.absolute()
    asked = [(Path(path), True) for path in spec.mounts]
    roots = [(path, False) for path in settings.data_roots if with_data and path.exists()]
    targets: dict[Path, Path] = {}
    for path, is_asked_for in [*asked, *roots]:
        source = path.resolve()
        # This is what is mounted, and a link on the way may have been changed since the job was checked.
        _refuse_if_dangerous(source, settings)
        if is_asked_for:
            _refuse_if_not_allowed(source, settings)
        # Under its own name and, where that is a link, under that of the place it leads to.
        targets |= {path.absolute(): source, source: source}
    for target, source in targets.items():
        yield _bind(source, str(target), read_only=True)
    if not with_data:
        return
    if spec.kind == "container":
        yield _bind(folder / orders.OUTPUTS, "/results", read_only=False)
    else:
        yield _bind(folder, "/job", read_only=True)
        yield _bind(folder / orders.RUN, f"/job/{orders.RUN}", read_only=False)


def _bind(source: Path, target: str, read_only: bool) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": str(source),
        "Target": target,
        "ReadOnly": read_only,
        "BindOptions": {"Propagation": "rprivate"},
    }


def _is_allowed(image: str, patterns: Sequence[str]) -> bool:
    last = image.rpartition("/")[2]
    full = image if ":" in last or "@" in last else f"{image}:latest"
    return any(fnmatch.fnmatchcase(name, pattern) for name in (image, full) for pattern in patterns)


def _refuse_if_not_allowed(path: Path, settings: ServiceSettings) -> None:
    allowed = [root.resolve() for root in settings.mounts]
    if not path.is_absolute() or not any(path.resolve().is_relative_to(root) for root in allowed):
        raise ConfigError(
            f"mounts: {path} is not in a folder that jobs may ask to see; those are "
            f"{', '.join(map(str, settings.mounts)) or 'none: the operator lists them in `mounts`'}"
        )
    if not path.exists():
        raise ConfigError(f"mounts: {path} does not exist on the service's machine")


def _refuse_if_dangerous(path: Path, settings: ServiceSettings) -> None:
    """Never the whole disk, the engine's socket, the system's own folders, or the service's tokens and secrets."""
    real = path.resolve()
    kept = [*_ENGINES, *_engine_socket(settings.backends.docker), settings.state]
    kept += [] if settings.secrets is None else [settings.secrets]
    inside = [settings.state, settings.secrets] if settings.secrets else [settings.state]
    for secret in kept:
        if secret.resolve().is_relative_to(real) or secret.absolute().is_relative_to(path.absolute()):
            raise ConfigError(
                f"mounts, data_roots: {path} holds {secret}, which no job may see; choose a smaller folder"
            )
    for folder in [*inside, *_SYSTEM]:
        if real.is_relative_to(folder.resolve()):
            raise ConfigError(f"mounts, data_roots: {path} lies in {folder}, which no job may see")


def _refuse_unreachable_record(settings: ServiceSettings) -> None:
    """A job that could not write to its run would end at its first step."""
    uri = settings.worker_tracking_uri or settings.tracking_uri or store.default_uri()
    parts = urlsplit(uri)
    if parts.scheme in ("", "file", "sqlite") or parts.hostname in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
        raise ConfigError(
            f"containers cannot reach the record at {store.shown(uri)}; run `mlflow server` on an address that they "
            "can reach, and write it to worker_tracking_uri, as http://mlflow:5000"
        )


def _engine_socket(settings: DockerSettings) -> list[Path]:
    url = settings.url or os.environ.get("DOCKER_HOST", "")
    return [Path(url.removeprefix("unix://"))] if url.startswith("unix://") else []
