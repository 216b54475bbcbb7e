"""A job as the service knows it: its spec, where it stands, and what became of each attempt. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from service.jobs.spec import JobSpec

State = Literal["queued", "starting", "running", "stopping", "finished", "failed", "killed"]
# Where a job can go from each state. Back to "queued": a further attempt.
TRANSITIONS: Mapping[State, tuple[State, ...]] = {
    "queued": ("starting", "killed", "failed"),
    "starting": ("running", "queued", "stopping", "finished", "failed", "killed"),
    "running": ("queued", "stopping", "finished", "failed", "killed"),
    "stopping": ("killed", "finished", "failed"),
    "finished": (),
    "failed": ("queued",),
    "killed": ("queued",),
}
ENDED: frozenset[State] = frozenset({"finished", "failed", "killed"})
# What MLflow's run says meanwhile.
STATUS: Mapping[State, str] = {
    "queued": "SCHEDULED",
    "starting": "SCHEDULED",
    "running": "RUNNING",
    "stopping": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
}
# So many of a job's attempts are kept: its run's tags have a length. Each has its number.
KEPT_ATTEMPTS = 50


@dataclass(frozen=True)
class Attempt:
    """One start of a job.

    Attributes:
        number: from 1.
        name: of what the backend makes, always the same: `lorot-`, 12 digits of the job's id, `-`, the number.
        handle: what the backend finds it again by, as JSON; empty before it was started.
        started_s, ended_s: seconds since the epoch; 0: not yet.
        exit_code: of the command; None: not ended, or nobody knows.
        reason: why it ended, in a sentence; "" while it runs or after success.
        image_digest: of the image that ran, as sha256:...; "" without one.
    """

    number: int
    name: str
    handle: Mapping[str, Any] = field(default_factory=dict)
    started_s: float = 0.0
    ended_s: float = 0.0
    exit_code: int | None = None
    reason: str = ""
    image_digest: str = ""


@dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
        id: of its MLflow run, 32 hexadecimal digits.
        experiment_id: MLflow's.
        spec: as submitted, checked.
        state: where it stands.
        owner: name of the token that submitted it; "" for local use.
        key: the client's, which makes a submission idempotent; "" without one.
        submitted_s, ended_s: seconds since the epoch; 0: not yet.
        queued_s: since when it waits or has waited for its turn: when it was submitted, retried or resumed by hand.
        attempts: the last KEPT_ATTEMPTS, the oldest first; empty before the first start.
        reason: why it ended, or why it waits, in a sentence; "" if there is nothing to say.
        cancel: somebody has asked to stop it.
        resume: the next attempt goes on from the last checkpoint.
        failures: attempts that count against `spec.retries` since it was last submitted, retried or resumed by hand.
    """

    id: str
    experiment_id: str
    spec: JobSpec
    state: State
    owner: str = ""
    key: str = ""
    submitted_s: float = 0.0
    ended_s: float = 0.0
    attempts: tuple[Attempt, ...] = ()
    reason: str = ""
    cancel: bool = False
    resume: bool = False
    failures: int = 0
    queued_s: float = 0.0

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def newest(self) -> int:
        """The number of the newest attempt; 0 before the first."""
        return self.attempt.number if self.attempt else 0

    @property
    def attempt(self) -> Attempt | None:
        """The newest."""
        return self.attempts[-1] if self.attempts else None
