"""How an attempt stands, told from what a Docker engine says of its containers. Asks no engine. Imports no torch."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from service.errors import REQUEUE, LostPeerError
from service.jobs.backends import Status
from service.jobs.backends.docker.containers import NODE

# Of workers that may have ended only because another one did.
_CAUSED = (REQUEUE, LostPeerError.exit_code)
# What the engine itself reports in a command's place.
_COULD_NOT_START = {
    125: "the engine could not run it",
    126: "its program cannot be executed",
    127: "its image has no such program",
}


@dataclass(frozen=True)
class Node:
    """One container.

    Attributes:
        number: of the node.
        phase: as of `Status`, without "gone".
        code: the engine's exit code: 128 + N after signal N.
        out_of_memory: the kernel killed something in it for its limit.
        error: the engine's own words, if it could not start it.
        started_s, ended_s: seconds since the epoch; 0: not yet.
        memory: limit in bytes; 0: none.
    """

    number: int
    phase: Literal["waiting", "running", "ended"]
    code: int
    out_of_memory: bool
    error: str
    started_s: float
    ended_s: float
    memory: int

    @classmethod
    def of(cls, inspected: Mapping[str, Any]) -> "Node":
        """From the engine's `GET /containers/ID/json`."""
        state, config = inspected["State"], inspected["Config"]
        code, error = int(state.get("ExitCode") or 0), str(state.get("Error") or "")
        phase: Literal["waiting", "running", "ended"] = "running"
        if state["Status"] in ("exited", "dead", "removing") or has_run(state):
            phase = "ended"
        elif state["Status"] == "created":
            # One that could not be started stays so, with what went wrong.
            phase = "ended" if error else "waiting"
            code = code or 125
        return cls(
            number=int(config["Labels"][NODE]),
            phase=phase,
            code=code,
            out_of_memory=bool(state.get("OOMKilled")),
            error=error,
            started_s=_seconds(state.get("StartedAt")),
            ended_s=_seconds(state.get("FinishedAt")),
            memory=int(inspected["HostConfig"].get("Memory") or 0),
        )

    @property
    def has_failed(self) -> bool:
        return self.phase == "ended" and self.code != 0

    def reason(self) -> str:
        """What the engine knows of why it ended; "" if that is no more than the exit code."""
        if self.error:
            return f"{_COULD_NOT_START.get(self.code, 'it could not be started')}: {self.error}"
        if not self.code:
            return ""
        if self.out_of_memory:
            limit = f" of {self.memory / 2**20:.0f} MiB" if self.memory else ""
            return (
                f"out of memory: the kernel killed it for its limit{limit}; ask for more by resources.memory, or let "
                "it need less by a smaller micro_batch, fewer workers or data.prefetch=1"
            )
        if self.code == 128 + signal.SIGKILL:
            return (
                "killed (SIGKILL), not for a memory limit of its own: it did not stop within its grace, somebody "
                "killed it, or the engine or the machine went down with it"
            )
        if self.code == 255:
            return (
                "exit code 255, which the engine also notes for a container that it lost when it or the machine crashed"
            )
        if self.code in _COULD_NOT_START:
            return f"exit code {self.code}: {_COULD_NOT_START[self.code]}"
        return ""


def status(nodes: Sequence[Node], fewest: int, image_digest: str = "") -> Status:
    """What the containers of one attempt amount to; `nodes` holds at least one.

    An elastic job has ended well when as many nodes as it needs have; otherwise the first failure counts that was not
    itself the consequence of another one.
    """
    lines = tuple(f"node {node.number}: {_line(node)}" for node in sorted(nodes, key=lambda node: node.number))
    started_s = min((node.started_s for node in nodes if node.started_s), default=0.0)
    if any(node.phase != "ended" for node in nodes):
        phase: Literal["waiting", "running"] = "running" if any(_began(node) for node in nodes) else "waiting"
        return Status(phase, image_digest=image_digest, started_s=started_s, nodes=lines)
    ended_s = max(node.ended_s for node in nodes)
    failed = [node for node in nodes if node.code]
    if not failed or len(nodes) - len(failed) >= fewest:
        return Status("ended", 0, image_digest=image_digest, started_s=started_s, ended_s=ended_s, nodes=lines)
    first = cause(failed)
    reason = first.reason()
    if reason and len(nodes) > 1:
        reason = f"node {first.number}: {reason}"
    return Status(
        "ended",
        first.code,
        reason=reason,
        out_of_memory=first.out_of_memory,
        image_digest=image_digest,
        started_s=started_s,
        ended_s=ended_s,
        nodes=lines,
    )


def cause(failed: Sequence[Node]) -> Node:
    """The failure that came first, of those that are no consequence of another."""
    return min(failed, key=lambda node: (node.code in _CAUSED, node.ended_s, node.number))


def is_hopeless(nodes: Sequence[Node], fewest: int) -> bool:
    """Whether some still run that cannot end well, because too few are left of those that had to."""
    hopeful = [node for node in nodes if not node.has_failed]
    return any(node.phase != "ended" for node in nodes) and len(hopeful) < min(fewest, len(nodes))


def has_run(state: Mapping[str, Any]) -> bool:
    """Whether what the engine calls "created" has run and ended: it went down as it started it, and saw its end."""
    return state["Status"] == "created" and _seconds(state.get("FinishedAt")) > 0


def _began(node: Node) -> bool:
    return node.phase != "waiting"


def _line(node: Node) -> str:
    if node.phase != "ended":
        return node.phase
    if not node.code:
        return "finished"
    return node.reason() or f"ended with exit code {node.code}"


def _seconds(text: Any) -> float:
    """Seconds since the epoch of the engine's times; its year 1 means never."""
    if not text or str(text).startswith("0001-"):
        return 0.0
    return datetime.fromisoformat(str(text)).timestamp()
