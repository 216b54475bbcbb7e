"""Jobs on this machine without a service: each command moves the record on a step, and jobs go on by themselves.

What `service.client.Client` does over HTTP, with the same answers. Imports no web framework.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from service.api import server_note, shapes
from service.errors import TakenError
from service.explaining import validated
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.job import Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec

_PAUSE_S = 0.2


class Serverless:
    """The record of `settings`, and its controller as long as this is open.

    Where a service has the record already, jobs can be looked at, and nothing can be changed: raises TakenError.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self._desk = Desk(settings)
        self._controller = Controller(self._desk)
        self._taken: TakenError | None = None
        self._moved_on = 0.0
        try:
            self._controller.open()
        except TakenError as error:
            self._taken = error
        self._move_on()

    def close(self) -> None:
        """Let go of the record. Jobs go on."""
        self._controller.stop()

    def submit(self, spec: Mapping[str, Any], key: str) -> tuple[dict[str, Any], bool]:
        """The job of this key, and whether it is new; it has been started if there is room for it."""
        self._refuse_if_taken()
        job, is_new = self._desk.submit(validated(JobSpec, spec, "this job"), key=key)
        self._controller.step()
        return shapes.job(self._desk.get(job.id)), is_new

    def page(self, cursor: str | None = None, **questions: Any) -> dict[str, Any]:
        """{"jobs", "next", "total", "partial"}; `shapes.PageShape` says what each one is."""
        return shapes.page(self._desk.page(cursor=cursor, **questions))

    def job(self, job_id: str) -> dict[str, Any]:
        """A job and its progress."""
        self._move_on()
        job = self._desk.get(job_id)
        return shapes.job(job, self._desk.progress(job.id))

    def compare(self, job_ids: Sequence[str]) -> dict[str, Any]:
        """{"jobs", "names", "configurations", "settings", "metrics", "best"}, with a value for each job."""
        self._move_on()
        found: dict[str, Any] = shapes.finite(self._desk.compare(job_ids))
        return found

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ask a job to stop; it is asked now."""
        self._refuse_if_taken()
        return self._stepped(self._desk.cancel(job_id))

    def retry(self, job_id: str) -> dict[str, Any]:
        """Queue it anew, and start it if there is room."""
        self._refuse_if_taken()
        return self._stepped(self._desk.retry(job_id))

    def resume(self, job_id: str) -> dict[str, Any]:
        """Queue it from its last checkpoint, and start it if there is room."""
        self._refuse_if_taken()
        return self._stepped(self._desk.resume(job_id))

    def logs(
        self, job_id: str, *, attempt: int | None = None, node: int = 0, tail: int | None = None, follow: bool = False
    ) -> Iterator[bytes]:
        """What a node has written; with `follow` until the attempt has ended, and so on with those after it."""
        job_id = self._desk.get(job_id).id
        more = self._move_on if follow else None
        yield from self._desk.logs(job_id, attempt=attempt, node=node, tail=tail, follow=more)
        number = self._desk.get(job_id).newest
        while follow and attempt is None:
            self._move_on()
            job = self._desk.get(job_id)
            if job.newest > number:
                number += 1
                yield from self._desk.logs(job_id, attempt=number, node=node, follow=more)
            elif job.has_ended:
                return
            else:
                time.sleep(_PAUSE_S)

    def _move_on(self) -> bool:
        """Let everything go one step, or see what the service has done; always true. Not more often than it polls."""
        now = time.monotonic()
        if not self._moved_on or now - self._moved_on >= self._desk.settings.poll_s:
            if self._taken is None:
                self._controller.step()
            else:
                self._desk.record.reload()
            self._moved_on = time.monotonic()
        return True

    def _stepped(self, job: Job) -> dict[str, Any]:
        self._controller.step()
        return shapes.job(self._desk.get(job.id))

    def _refuse_if_taken(self) -> None:
        if self._taken is None:
            return
        url = server_note.read(self._desk.settings)
        advice = f"send this to it with --server {url}" if url else "send this to it with --server URL"
        raise TakenError(f"{self._taken}; {advice}")
