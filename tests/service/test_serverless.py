"""`lorot submit`, `cancel`, `resume`, `retry` where no service runs: each command moves the record on and ends."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from service import store
from service.api.serverless import Serverless
from service.jobs.settings import ServiceSettings
from tests.service.job_specs import settings, spec
from tests.service.memory_backend import MemoryBackend


class Machine:
    """What stays between the commands: the record, and what runs."""

    def __init__(self, own: ServiceSettings) -> None:
        self.settings, self.backend = own, MemoryBackend()

    def command(self, name: str, *given: Any) -> Any:
        """One command from its beginning to its end."""
        with contextlib.closing(Serverless(self.settings)) as here:
            return getattr(here, name)(*given)

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.command("job", job_id)
        return found

    def running(self, job_id: str) -> str:
        """The one attempt that runs; a command later, it is the newest that the record knows."""
        (name,) = self.backend.running()
        assert self.job(job_id)["attempts"][-1]["name"] == name
        return name


@pytest.fixture
def machine(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(settings(tmp_path))
    monkeypatch.setattr("service.jobs.backends.load", lambda name, own: made.backend)
    return made


def test_a_job_is_cancelled_resumed_and_retried_by_commands_that_each_end_at_once(machine: Machine) -> None:
    job, is_new = machine.command("submit", spec(retries=0).model_dump(mode="json"), "a-key")
    assert is_new
    first = machine.running(job["id"])
    machine.command("cancel", job["id"])
    assert machine.backend.cancelled == [first]
    machine.backend.end(first, 75)
    shown = machine.job(job["id"])
    assert (shown["state"], shown["reason"]) == ("killed", "cancelled")
    assert store.client().get_run(job["id"]).info.status == "KILLED"

    machine.command("resume", job["id"])
    second = machine.running(job["id"])
    assert "--resume" in machine.backend.orders[second].command
    machine.backend.end(second, 3)
    assert machine.job(job["id"])["state"] == "failed"

    machine.command("retry", job["id"])
    third = machine.running(job["id"])
    assert "--resume" not in machine.backend.orders[third].command
    assert len({first, second, third}) == 3
    machine.backend.end(third, 0)
    assert machine.job(job["id"])["state"] == "finished"
    # The same key is the same job.
    again, is_new = machine.command("submit", spec(retries=0).model_dump(mode="json"), "a-key")
    assert (again["id"], is_new) == (job["id"], False)
