"""Jobs as objects of a Kubernetes cluster: a Job, an Indexed Job with a rendezvous, or a JobSet. Imports no torch.

The cluster schedules, queues and brings back pods that were pre-empted; the service starts a further attempt when one
has failed. Everything carries the attempt's name and labels, so it is found again without any note. What belongs to an
attempt is owned by its Job or JobSet, and goes with it.

After a cancel the attempt is "running" until its last pod has gone, then "gone": a cluster keeps nothing of what was
deleted, and with it the exit code.
"""

import contextlib
import fnmatch
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from service.errors import BackendError, ConfigError, StorageError
from service.jobs import attempt_files, log_file, orders
from service.jobs.backends import Handle, Order, Status
from service.jobs.backends.kubernetes import logs
from service.jobs.backends.kubernetes import status as standing
from service.jobs.backends.kubernetes.cluster import Cluster, Document
from service.jobs.backends.kubernetes.pods import Pod
from service.jobs.job import Job
from service.jobs.manifests.pods import ATTEMPT, JOB, ROLE
from service.jobs.manifests.rendering import configuration_of
from service.jobs.manifests.workloads import objects, owned
from service.jobs.places import Place, PlaceLostError
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec


class KubernetesBackend:
    """One namespace of a cluster. Thread-safe."""

    name = "kubernetes"

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._place = settings.backends.kubernetes
        self._cluster = Cluster(self._place)

    def check(self, job: Job) -> None:
        """Refuse what no cluster is to do for this job; raises ConfigError. Asks none."""
        self._check_place(job)
        self._check_priority(job.spec)

    def _check_place(self, job: Job) -> None:
        """All but its priority: one that was taken before keeps its turn, whatever classes there are by now."""
        spec, place = job.spec, self._place
        if spec.mounts:
            raise ConfigError("mounts: a cluster shows no folders of a host; data comes from the volume at /data")
        image = spec.image or place.image
        if spec.image is not None and not any(fnmatch.fnmatchcase(image, pattern) for pattern in place.images):
            raise ConfigError(f"image {image}: is none that jobs may name here; those are {', '.join(place.images)}")
        if spec.most_nodes > 1 and place.results_claim is None:
            raise ConfigError(
                "nodes: several of them share one volume for results, and this service names none; set "
                "backends.kubernetes.results_claim to a claim that many nodes can write to (ReadWriteMany)"
            )
        self._check_tracking(spec)

    def _check_priority(self, spec: JobSpec) -> None:
        """Refuse a priority that no pod would show: of what comes to the cluster, the cluster decides what is next."""
        known = self._place.priority_classes
        if spec.priority and spec.priority not in known:
            there_are = ", ".join(map(str, sorted({0, *known})))
            raise ConfigError(
                f"priority: {spec.priority} has no class in this cluster; those that have are {there_are}, and "
                "backends.kubernetes.priority_classes names more"
            )

    def _check_tracking(self, spec: JobSpec) -> None:
        uri = orders.places(spec, self._settings.results, self._settings).tracking_uri
        if "@" in urllib.parse.urlsplit(uri).netloc:
            raise ConfigError(
                "worker_tracking_uri: holds a password, which anyone who reads the cluster's objects would see; leave "
                "it away there, and put MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD into the Secret that "
                "backends.kubernetes.job_secret names"
            )

    def start(self, order: Order) -> Handle:
        """Make the objects of an attempt, or those that are missing of it.

        Raises:
            ConfigError: the cluster finds them faulty.
            BackendError: it does not answer or does not allow it, or the name is taken by something else.
        """
        self._check_place(order.job)
        owner = self._workload(order.name, {})
        jobsets = owner["kind"] == "JobSet" if owner else order.job.spec.most_nodes > 1 and self._jobsets_wanted()
        first, *rest = objects(order, self._place, configuration_of(order), jobsets=jobsets)
        if owner is None:
            owner = self._cluster.create(first) or self._cluster.get(first["kind"], order.name)
        if owner is None:
            raise BackendError(f"{first['kind']} {order.name} came and went while it was made; ask again")
        if owner["metadata"].get("labels", {}).get(JOB) != order.job.id:
            raise BackendError(
                f"{owner['kind']} {order.name} in namespace {self._place.namespace} is not of job {order.job.id}; "
                "delete it, or give this service a namespace of its own"
            )
        for part in rest:
            # One that is there already was made by an earlier call.
            self._cluster.create(owned(part, {**owner, "apiVersion": first["apiVersion"]}))
        return {
            "kind": owner["kind"],
            "namespace": self._place.namespace,
            "uid": owner["metadata"].get("uid", ""),
            "folder": str(order.folder.absolute()),
        }

    def status(self, name: str, handle: Handle) -> Status:
        """How the attempt stands; by what was noted of its end once it is removed.

        Once it has ended its logs are in the job's folder, from where the record takes them.
        """
        workload = self._workload(name, handle)
        pods = self._pods(name)
        warnings: Sequence[str] = ()
        if workload is not None and not pods and not workload.get("spec", {}).get("suspend"):
            # Of a JobSet it is the Job in it that cannot make its pods.
            warnings = self._warnings(f"{name}-node-0" if workload["kind"] == "JobSet" else name)
        found = standing.status(workload, pods, warnings)
        if found.phase == "ended":
            # How it ended must be heard of on a full disk too; the logs are kept later, or not removed.
            with contextlib.suppress(StorageError):
                self._keep_logs(name, handle)
        if found.phase == "gone":
            return attempt_files.noted(*self._kept(name, handle)) or found
        return found

    def logs(
        self,
        name: str,
        handle: Handle,
        *,
        node: int = 0,
        tail: int | None = None,
        follow: Callable[[], bool] | None = None,
        since: str = "",
    ) -> Iterator[bytes]:
        """What a node has written, in its pods one after the other, or in the job's folder once they are removed.

        Raises:
            BackendError: the cluster does not answer, or broke off a log.
            PlaceLostError: `since` is not in it any more.
        """
        found = self._pods(name, node)
        place = Place.parse(since) if since else None
        if not found and (self._workload(name, handle) is None or follow is None):
            if place is not None:
                raise PlaceLostError("the pods are gone, and the copy of their log has no times")
            yield from log_file.read(attempt_files.log(*self._kept(name, handle), node), tail=tail)
        elif follow is None:
            yield from logs.read(self._cluster, found, tail)
        else:
            yield from logs.follow(
                self._cluster, lambda: self._of_node(name, handle, node), follow, tail=tail, since=place
            )

    def cancel(self, name: str, handle: Handle, grace_s: float) -> None:
        """Delete the attempt; its pods are told to stop, and killed after the grace that they were made with."""
        workload = self._workload(name, handle)
        if workload is None or workload["metadata"].get("deletionTimestamp"):
            return
        with contextlib.suppress(StorageError):
            self._keep_logs(name, handle)
        self._cluster.delete(workload["kind"], name)

    def remove(self, name: str, handle: Handle) -> None:
        """Delete what an attempt that has ended has left, after its logs and its end were put into the job's folder."""
        workload = self._workload(name, handle)
        if workload is None:
            return
        if not workload["metadata"].get("deletionTimestamp"):
            try:
                self._keep_logs(name, handle)
                status = standing.status(workload, self._pods(name))
                if status.phase == "ended":
                    attempt_files.note(*self._kept(name, handle), status)
            except StorageError as error:
                raise BackendError(f"the objects of {name} are left for now: {error}") from None
            self._cluster.delete(workload["kind"], name)

    def reconcile(self) -> dict[str, str]:
        """The attempts that have a Job or JobSet in the namespace, and the job of each."""
        kinds = ["Job", *(["JobSet"] if self._cluster.has_jobsets() else [])]
        found = [document for kind in kinds for document in self._cluster.find(kind, labels=f"{JOB},{ROLE}=attempt")]
        return {document["metadata"]["name"]: document["metadata"]["labels"][JOB] for document in found}

    def close(self) -> None:
        """Let go of the cluster."""
        self._cluster.close()

    def _jobsets_wanted(self) -> bool:
        """Whether fixed gangs are JobSets; raises ConfigError where they have to be, and cannot."""
        if self._place.kind == "job":
            return False
        there = self._cluster.has_jobsets()
        if self._place.kind == "jobset" and not there:
            raise ConfigError(
                "backends.kubernetes.kind: the cluster has no JobSets; install them (deploy/README.md), or set "
                "kind to auto or job"
            )
        return there

    def _workload(self, name: str, handle: Handle) -> Document | None:
        kind = handle.get("kind")
        if kind:
            return self._cluster.get(str(kind), name)
        found = self._cluster.get("Job", name)
        if found is None and self._place.kind != "job" and self._cluster.has_jobsets():
            found = self._cluster.get("JobSet", name)
        return found

    def _pods(self, name: str, node: int | None = None) -> list[Pod]:
        """Of the attempt's nodes, or of one of them, the oldest first."""
        found = [Pod(document) for document in self._cluster.find("Pod", labels=f"{ATTEMPT}={name},{ROLE}=node")]
        return sorted((pod for pod in found if node is None or pod.node == node), key=lambda pod: pod.created_s)

    def _of_node(self, name: str, handle: Handle, node: int) -> tuple[list[Pod], bool]:
        """The pods of a node, and whether there may come more."""
        workload = self._workload(name, handle)
        pods = self._pods(name)
        lives = standing.status(workload, pods).phase in ("waiting", "running")
        return [pod for pod in pods if pod.node == node], lives

    def _warnings(self, name: str) -> list[str]:
        """What the cluster has against an attempt that has no pods, the newest first."""
        found = self._cluster.find("Event", fields=f"involvedObject.name={name},type=Warning")
        found.sort(key=lambda event: str(event.get("lastTimestamp") or event["metadata"].get("creationTimestamp", "")))
        return [f"{event.get('reason', '')}: {event.get('message', '')}" for event in reversed(found)]

    def _keep_logs(self, name: str, handle: Handle) -> None:
        """Copy the logs of all nodes to the job's folder, once."""
        pods = self._pods(name)
        folder, number = self._kept(name, handle)
        for node in sorted({pod.node for pod in pods}):
            target = attempt_files.log(folder, number, node)
            if not target.exists():
                # Of a machine that is gone nobody can read it any more.
                with contextlib.suppress(BackendError):
                    of_node = [pod for pod in pods if pod.node == node]
                    logs.keep(self._cluster, of_node, folder, target.relative_to(folder).as_posix())

    def _kept(self, name: str, handle: Handle) -> tuple[Path, int]:
        """The job's folder and the attempt's number."""
        return attempt_files.place(self._settings.results, name, handle)
