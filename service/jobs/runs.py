"""Reading jobs from MLflow's runs: the open ones, all of them page by page, a single one. Imports no torch."""

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from service import run_creation, store
from service.errors import ConfigError
from service.jobs import job_tags
from service.jobs.job import ENDED, STATUS, Job

_log = logging.getLogger(__name__)

# Runs come whole, with all their parameters and metrics: few at once, or they take more memory than all jobs do.
_PAGE = 50
_JOBS = f"tags.`{job_tags.JOB}` = '1'"
# One question: a job that goes from one open state to another between two would be missed.
_OPEN = " AND ".join(f"tags.`{job_tags.JOB}.state` != '{state}'" for state in sorted(ENDED))
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Found:
    """A job as its run tells it.

    Attributes:
        status: the run's, which workers set too.
        key: that twins share, runs that a server has made of one question.
    """

    job: Job
    status: str
    key: str

    @property
    def is_settled(self) -> bool:
        """Whether the status is the state's; of a job that runs, its workers have a word in it."""
        is_ours = self.job.has_ended or self.job.state == "queued"
        return not is_ours or self.status == STATUS[self.job.state]


class Pages:
    """Jobs, the newest first. Whatever is made or deleted meanwhile, no other one is missed, and none comes twice.

    Args:
        uri: MLflow.
        narrowed: a condition on their runs, in MLflow's language.

    Attributes:
        is_last: there is nothing left to read.
    """

    def __init__(self, uri: str, narrowed: str = "") -> None:
        self.is_last = False
        self._uri = uri
        self._conditions = [_JOBS, *filter(None, [narrowed])]
        self._experiments: list[str] | None = None
        # Runs of the moment `_until` that were read, and, if there are too many for a page, how far that was.
        self._until: int | None = None
        self._seen: set[str] = set()
        self._token: str | None = None

    def read(self) -> list[Found]:
        """The next ones; where MLflow fails, raises TrackingError, and the same are read next time."""
        with store.explained(self._uri):
            api = store.client(self._uri)
            if self._experiments is None:
                self._experiments = [str(one.experiment_id) for one in store.pages(api.search_experiments)]
            if not self._experiments:
                self.is_last = True
                return []
            # From a moment on, not from a number: what is deleted would let as many others slip through.
            since = [] if self._until is None else [f"attributes.start_time <= {self._until}"]
            page = api.search_runs(
                self._experiments,
                " AND ".join([*self._conditions, *since]),
                order_by=["attributes.start_time DESC"],
                max_results=_PAGE,
                page_token=self._token,
            )
        found = _decoded(run for run in page if run.info.run_id not in self._seen)
        self.is_last = not page.token
        if page.token:
            oldest = int(page[-1].info.start_time)
            if oldest != self._until:
                self._until, self._token, self._seen = oldest, None, set()
            else:
                self._token = page.token
            self._seen.update(str(run.info.run_id) for run in page if run.info.start_time == oldest)
        return found


def open_ones(uri: str) -> list[Found]:
    """The jobs that have not ended, by their tags; raises TrackingError."""
    return everything(Pages(uri, _OPEN))


def everything(pages: Pages) -> list[Found]:
    """All that is left of these pages; raises TrackingError."""
    found: list[Found] = []
    while not pages.is_last:
        found += pages.read()
    return found


def one(uri: str, run_id: str) -> list[Found]:
    """The job that this run is; none if there is no such run, it was deleted or is no job. Raises TrackingError."""
    with store.explained(uri), store.passing_over(*_MISSING):
        run = store.client(uri).get_run(run_id)
        is_job = run.info.lifecycle_stage == "active" and run.data.tags.get(job_tags.JOB) == "1"
        return _decoded([run] if is_job else [])
    return []


def beginning_with(uri: str, prefix: str) -> list[Found]:
    """The jobs whose id begins with these hexadecimal digits; raises TrackingError."""
    return everything(Pages(uri, f"attributes.run_id LIKE '{prefix}%'"))


def configurations(uri: str, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """By id what jobs were resolved to, of those of which that is recorded, in one search; raises TrackingError."""
    found: dict[str, dict[str, Any]] = {}
    ids = ", ".join(f"'{job.id}'" for job in jobs)
    with store.explained(uri):
        search, experiments = store.client(uri).search_runs, sorted({job.experiment_id for job in jobs})
        asked = {"filter_string": f"attributes.run_id IN ({ids})", "max_results": _PAGE}
        for run in store.pages(search, experiment_ids=experiments, **asked) if jobs else ():
            # Of one that somebody has changed, nothing is recorded any more.
            with contextlib.suppress(ConfigError):
                if resolved := job_tags.decode_config(run.data.tags):
                    found[str(run.info.run_id)] = resolved
    return found


def _decoded(runs: Iterable[Any]) -> list[Found]:
    found = []
    for run in runs:
        job_id, tags = str(run.info.run_id), run.data.tags
        try:
            job = job_tags.decode(job_id, str(run.info.experiment_id), tags)
        except (ValueError, TypeError) as error:
            _log.warning("run %s has tags of a job that cannot be read and is left alone: %s", job_id, error)
            continue
        key = tags.get(job_tags.KEY, "")
        found.append(Found(job, str(run.info.status), key if run_creation.is_key(key) else job_id))
    return found
