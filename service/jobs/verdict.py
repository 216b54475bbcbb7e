"""What the end of an attempt means for its job. Pure functions. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.errors import EXIT_CODES, REQUEUE
from service.jobs.backends import Status
from service.jobs.job import Job, State

# Another attempt would end the same: bad input, bad data, a loss that is not finite, no usable checkpoint.
FINAL = (2, 3, 4, 5)
_INTERRUPTED = 130
_KILLED = (137, -9)
_TERMINATED = (143, -15)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job.

    Attributes:
        state: its next one; "queued": another attempt.
        reason: why the attempt ended; "" after success.
        failures: how many count now.
    """

    state: State
    reason: str
    failures: int

    def fields(self) -> dict[str, Any]:
        """For `Record.update`."""
        fields: dict[str, Any] = {"state": self.state, "reason": self.reason, "failures": self.failures}
        return fields | {"resume": True} if self.state == "queued" else fields


def judge(job: Job, status: Status, said: str = "") -> Verdict:
    """What the end of the newest attempt means.

    Args:
        status: "ended" or "gone".
        said: what the attempt itself has said of its end.
    """
    code = status.exit_code
    if code == 0:
        return Verdict("finished", "", job.failures)
    reason = explain(status, said, is_ours=job.spec.kind != "container")
    if job.cancel:
        return Verdict("killed", "cancelled", job.failures)
    if status.preempted:
        return Verdict("queued", reason, job.failures)
    # A container's own program gives its exit codes other meanings.
    if job.spec.kind != "container":
        if code == REQUEUE or code in _TERMINATED:
            return Verdict("queued", reason, job.failures)
        if code == _INTERRUPTED:
            return Verdict("killed", reason, job.failures)
        if code in FINAL:
            return Verdict("failed", reason, job.failures + 1)
    failures = job.failures + 1
    if failures <= job.spec.retries:
        return Verdict("queued", reason, failures)
    if job.spec.retries:
        reason += f"; that was failure {failures}, and {job.spec.retries} are retried"
    return Verdict("failed", reason, failures)


def explain(status: Status, said: str = "", *, is_ours: bool = True) -> str:
    """Why an attempt ended, in a sentence."""
    code = status.exit_code
    if status.phase == "gone":
        return status.reason or "it is gone, and nothing says how it ended"
    if status.out_of_memory:
        return status.reason or "the kernel killed it because memory ran out; give it more, or a smaller micro_batch"
    if status.reason or said:
        return status.reason or said
    if code is None:
        return "it ended, and nobody knows how"
    if code < 0 or code in _KILLED or code in _TERMINATED:
        return f"signal {-code if code < 0 else code - 128} ended it"
    meaning: Mapping[int, str] = EXIT_CODES if is_ours else {}
    return f"exit code {code}" + (f": {meaning[code]}" if code in meaning else "")
