"""What one pod says of the node that it is: since when it runs, why it waits, how it ended. Data alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from service.errors import EXIT_CODES, REQUEUE, LostPeerError
from service.jobs.manifests.pods import MAIN

INDEX = "batch.kubernetes.io/job-completion-index"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DISRUPTIONS = {
    "PreemptionByScheduler": "a pod of higher priority took its place",
    "DeletionByTaintManager": "its machine was taken out of use",
    "EvictionByEvictionAPI": "its machine was being emptied",
    "DeletionByPodGC": "its machine is gone",
    "TerminationByKubelet": "its machine ran short of something, or was shut down",
}
_IMAGES = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}


def seconds(time: str | None) -> float:
    """Of an RFC 3339 time since the epoch; 0 without one."""
    return datetime.fromisoformat(time).timestamp() if time else 0.0


@dataclass(frozen=True)
class Pod:
    """A pod as the API server gives it."""

    raw: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.raw["metadata"]["name"])

    @property
    def node(self) -> int:
        """Which of the job's nodes it is."""
        return int(self.raw["metadata"].get("labels", {}).get(INDEX, 0))

    @property
    def created_s(self) -> float:
        return seconds(self.raw["metadata"].get("creationTimestamp"))

    @property
    def phase(self) -> str:
        return str(self._status.get("phase", "Pending"))

    @property
    def has_ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def is_at_work(self) -> bool:
        """The command runs, or its machine is about to start it."""
        return self.phase == "Running" or (not self.has_ended and "running" in self._main.get("state", {}))

    @property
    def exit_code(self) -> int | None:
        """Of the command; None while it runs, and where it never ran or nobody saw its end."""
        code = self._ended.get("exitCode")
        return None if code is None else int(code)

    @property
    def has_succeeded(self) -> bool:
        return self.phase == "Succeeded"

    @property
    def out_of_memory(self) -> bool:
        return self._ended.get("reason") == "OOMKilled"

    @property
    def preempted(self) -> bool:
        """It was, or will be, ended for others' sake."""
        return self._disruption is not None

    @property
    def started_s(self) -> float:
        state = self._main.get("state", {})
        return seconds(self._ended.get("startedAt") or state.get("running", {}).get("startedAt"))

    @property
    def ended_s(self) -> float:
        return seconds(self._ended.get("finishedAt"))

    @property
    def image_digest(self) -> str:
        found = _DIGEST.search(self._main.get("imageID", ""))
        return found[0] if found else ""

    @property
    def rank(self) -> tuple[int, float]:
        """Orders pods that failed by how likely each is the cause of the others' end."""
        code = self.exit_code
        if self.preempted:
            # Its peers were lost with it; one that failed by its own fault was not.
            kind = 2
        elif self.out_of_memory or code in (2, 3, 4, 5):
            kind = 0
        elif code == LostPeerError.exit_code:
            kind = 3
        elif code == REQUEUE:
            kind = 4
        else:
            kind = 1
        return kind, self.ended_s

    def waits_for(self) -> str:
        """Why it does not run yet, in a sentence; "" if it does or has."""
        if self.has_ended or self.is_at_work:
            return ""
        for status in (*self._status.get("initContainerStatuses", ()), self._main):
            waiting = status.get("state", {}).get("waiting", {})
            reason, message = waiting.get("reason", ""), waiting.get("message", "")
            if reason in _IMAGES:
                return f"image {status.get('image', '')} cannot be pulled: {message or reason}"
            if reason == "CreateContainerConfigError":
                return f"a Secret or ConfigMap that it names is not there: {message}"
            if reason in ("CreateContainerError", "RunContainerError", "CrashLoopBackOff"):
                return f"its container cannot be started: {message or reason}"
            if "running" in status.get("state", {}):
                return "waits for the rendezvous"
        scheduled = self._condition("PodScheduled")
        if scheduled.get("status") == "False":
            return f"no machine has room for it: {scheduled.get('message') or scheduled.get('reason', '')}"
        return "its image is pulled, its volumes are mounted" if scheduled else "waits for a machine"

    def end(self) -> str:
        """Why it failed, in a sentence; "" if it has not."""
        if self.phase != "Failed":
            return ""
        if self._disruption is not None:
            told = _DISRUPTIONS.get(self._disruption.get("reason", ""), "it was ended for others' sake")
            return f"it was pre-empted: {told}"
        if self.out_of_memory:
            return "memory ran out: it took more than resources.memory allows; a smaller micro_batch needs less"
        code, message = self.exit_code, self._ended.get("message") or self._status.get("message", "")
        if code is None:
            return str(message or self._status.get("reason") or "it ended, and nobody knows how").strip()
        what = EXIT_CODES.get(code) or (f"ended by signal {code - 128}" if 128 < code < 160 else "")
        told = f"exit code {code}" + (f": {what}" if what else "")
        return f"{told}; {message.strip()}" if message else told

    def line(self) -> str:
        """How it stands, for people."""
        if self.is_at_work:
            return f"node {self.node}: running on {self.raw.get('spec', {}).get('nodeName', 'a machine')}"
        if self.has_succeeded:
            return f"node {self.node}: finished"
        return f"node {self.node}: {self.end() or self.waits_for()}"

    @property
    def _status(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.raw.get("status", {})
        return found

    @cached_property
    def _main(self) -> Mapping[str, Any]:
        found = (status for status in self._status.get("containerStatuses", ()) if status.get("name") == MAIN)
        return next(found, {})

    @property
    def _ended(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._main.get("state", {}).get("terminated", {})
        return found

    @property
    def _disruption(self) -> Mapping[str, Any] | None:
        found = self._condition("DisruptionTarget")
        return found if found.get("status") == "True" else None

    def _condition(self, type: str) -> Mapping[str, Any]:
        return next((entry for entry in self._status.get("conditions", ()) if entry.get("type") == type), {})
