"""How a job is taken in, whether a program or the console's form sends it."""

import re

from fastapi import Request

from service.api.access import Identity
from service.api.faults import TooManyRequestsError
from service.api.meters import Meters
from service.errors import ConfigError
from service.jobs.desk import Desk
from service.jobs.job import Job
from service.jobs.spec import JobSpec

KEY = r"^[A-Za-z0-9._:-]*$"
LONGEST_KEY = 200
# After which a full queue may have room again, seconds.
_FULL_S = 30.0


def take_in(request: Request, spec: JobSpec, who: Identity, key: str) -> tuple[Job, bool]:
    """The job, and whether it is new; it is counted, and noted for the audit log.

    Raises:
        ConfigError: the key has other characters than it may, or as `Desk.submit`.
        TooManyRequestsError: as many jobs as may wait or run do already.
        StateError, BackendError, TrackingError: as `Desk.submit`.
    """
    desk: Desk = request.app.state.desk
    if len(key) > LONGEST_KEY or not re.fullmatch(KEY, key):
        raise ConfigError(f"key: {key[:80]!r} is none; use up to {LONGEST_KEY} letters, digits, '.', '_', ':' and '-'")
    most = desk.settings.limits.jobs
    if len(desk.record.open_jobs()) >= most:
        raise TooManyRequestsError(f"{most:,} jobs wait or run already, which is the most here", _FULL_S)
    job, is_new = desk.submit(spec, owner=who.name, key=key)
    request.state.job = job.id
    if is_new:
        meters: Meters = request.app.state.meters
        meters.submissions.labels(job.spec.kind, job.spec.backend).inc()
    return job, is_new


__all__ = ["KEY", "LONGEST_KEY", "take_in"]
