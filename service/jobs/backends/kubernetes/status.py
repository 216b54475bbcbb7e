"""From what a cluster says of an attempt's objects to how the attempt stands. Pure functions."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from service.jobs.backends import Status
from service.jobs.backends.kubernetes.pods import Pod, seconds
from service.jobs.manifests.workloads import QUEUE

# As the Job controller tells which pod has ended the job.
_CODE = re.compile(r"exit code (\d+)")


def status(workload: Mapping[str, Any] | None, pods: Sequence[Pod], warnings: Sequence[str] = ()) -> Status:
    """How an attempt stands.

    Args:
        workload: its Job or JobSet; None: there is none.
        pods: of its nodes, those of earlier tries included.
        warnings: what the cluster said of the workload, the newest first.
    """
    latest = _latest(pods)
    if workload is None or workload["metadata"].get("deletionTimestamp"):
        return _leaving(workload, latest)
    ended = _condition(workload, "Complete") or _condition(workload, "Completed")
    if ended is not None:
        return _finished(latest, ended)
    failed = _condition(workload, "Failed")
    if failed is not None or _is_over(workload, latest):
        return _failed(workload, latest, failed)
    lines = tuple(pod.line() for pod in latest)
    at_work = [pod for pod in latest if pod.is_at_work]
    if at_work:
        return Status("running", started_s=_started_s(latest), image_digest=_digest(latest), nodes=lines)
    return Status("waiting", reason=_why_waiting(workload, latest, warnings), nodes=lines)


def _leaving(workload: Mapping[str, Any] | None, latest: Sequence[Pod]) -> Status:
    """Of an attempt that was deleted: it is there until its last pod has gone."""
    alive = [pod for pod in latest if not pod.has_ended]
    if not alive and (workload is None or not latest):
        return Status("gone", reason="the cluster has nothing of that name; it was cancelled or deleted there")
    lines = tuple(pod.line() for pod in latest)
    started_s, digest = _started_s(latest), _digest(latest)
    return Status("running", reason="stopping", started_s=started_s, image_digest=digest, nodes=lines)


def _finished(latest: Sequence[Pod], condition: Mapping[str, Any]) -> Status:
    return Status(
        "ended",
        exit_code=0,
        started_s=_started_s(latest),
        ended_s=seconds(condition.get("lastTransitionTime")) or _ended_s(latest),
        image_digest=_digest(latest),
        nodes=tuple(pod.line() for pod in latest),
    )


def _is_over(workload: Mapping[str, Any], latest: Sequence[Pod]) -> bool:
    """Whether an elastic job is done although the cluster still tries to start nodes for it.

    A node that ends well says so for all. Those that come later would find nothing left to do.
    """
    at_work = any(pod.is_at_work for pod in latest)
    return _is_elastic(workload) and not at_work and any(pod.has_succeeded for pod in latest)


def _failed(workload: Mapping[str, Any], latest: Sequence[Pod], condition: Mapping[str, Any] | None) -> Status:
    condition = condition or {}
    final = condition.get("reason") == "PodFailurePolicy"
    if _is_elastic(workload) and not final and any(pod.has_succeeded for pod in latest):
        return _finished(latest, condition)
    causes = sorted((pod for pod in latest if pod.phase == "Failed"), key=lambda pod: pod.rank)
    ended_s = seconds(condition.get("lastTransitionTime")) or _ended_s(latest)
    shared: dict[str, Any] = {
        "started_s": _started_s(latest),
        "ended_s": ended_s,
        "image_digest": _digest(latest),
        "nodes": tuple(pod.line() for pod in latest),
    }
    if not causes:
        message = str(condition.get("message") or condition.get("reason") or "the cluster does not say why")
        found = _CODE.search(message)
        return Status("ended", exit_code=int(found[1]) if found else None, reason=message, **shared)
    cause = causes[0]
    several = len(latest) > 1
    return Status(
        "ended",
        exit_code=cause.exit_code,
        reason=f"node {cause.node}: {cause.end()}" if several else cause.end(),
        preempted=cause.preempted,
        out_of_memory=cause.out_of_memory,
        **shared,
    )


def _why_waiting(workload: Mapping[str, Any], latest: Sequence[Pod], warnings: Sequence[str]) -> str:
    if workload.get("spec", {}).get("suspend"):
        queue = workload["metadata"].get("labels", {}).get(QUEUE)
        return f"waits in the cluster's queue {queue}" if queue else "was suspended in the cluster"
    reasons = [(pod, why) for pod in latest if (why := pod.waits_for())]
    if reasons:
        # What is wrong says more than what merely takes time.
        pod, why = min(reasons, key=lambda entry: ":" not in entry[1])
        return f"node {pod.node}: {why}" if len(latest) > 1 else why
    ended = [pod.end() for pod in latest if pod.phase == "Failed"]
    if ended:
        return f"{ended[0]}; the cluster starts it again"
    return warnings[0] if warnings else "the cluster has not made its pods yet"


def _latest(pods: Iterable[Pod]) -> list[Pod]:
    """The newest pod of each node, by node."""
    found: dict[int, Pod] = {}
    for pod in sorted(pods, key=lambda pod: pod.created_s):
        found[pod.node] = pod
    return [found[node] for node in sorted(found)]


def _is_elastic(workload: Mapping[str, Any]) -> bool:
    return bool(workload.get("spec", {}).get("maxFailedIndexes"))


def _condition(workload: Mapping[str, Any], type: str) -> Mapping[str, Any] | None:
    for entry in workload.get("status", {}).get("conditions", ()):
        if entry.get("type") == type and entry.get("status") == "True":
            found: Mapping[str, Any] = entry
            return found
    return None


def _started_s(latest: Iterable[Pod]) -> float:
    return min((pod.started_s for pod in latest if pod.started_s), default=0.0)


def _ended_s(latest: Iterable[Pod]) -> float:
    return max((pod.ended_s for pod in latest), default=0.0)


def _digest(latest: Iterable[Pod]) -> str:
    return next((pod.image_digest for pod in latest if pod.image_digest), "")
