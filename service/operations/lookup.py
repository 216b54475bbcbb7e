"""What the record says about jobs, read without changing anything: another process, the service, writes it."""

from typing import Any

from service import store
from service.errors import ConfigError
from service.jobs import job_tags, runs
from service.jobs.job import ENDED, Job

_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class Lookup:
    """Questions to MLflow; each raises TrackingError if it does not answer.

    Args:
        uri: of the tracking server or database.
    """

    def __init__(self, uri: str) -> None:
        path = store.sqlite_path(uri)
        if path is not None and not path.exists():
            # One that was made now would know of no job, and all that lies there would look as if it were nobody's.
            raise ConfigError(f"{path}: there is no such tracking database; tracking_uri in the settings names it")
        store.ensure_ready(uri)
        self._uri = uri
        self._api = store.client(uri)

    def jobs(self) -> list[Job]:
        """All whose runs were not deleted; one that cannot be read is passed over."""
        return [one.job for one in runs.everything(runs.Pages(self._uri))]

    def is_unknown(self, run_id: str) -> bool:
        """Whether there is no run of this id, not even one that was deleted and can be brought back."""
        return self._run(run_id) is None

    def has_ended(self, job_id: str) -> bool:
        """Whether the job stands at its end now."""
        run = self._run(job_id)
        return run is not None and run.data.tags.get(f"{job_tags.JOB}.state") in ENDED

    def _run(self, run_id: str) -> Any:
        with store.explained(self._uri), store.passing_over(*_MISSING):
            return self._api.get_run(run_id)
        return None
