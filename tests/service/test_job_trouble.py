"""The loop where one job is in trouble, or the disk: it is that job's alone, and ends; others go on."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service import run_creation, store
from service.errors import BackendError, ConfigError, StorageError, TrackingError
from service.jobs import attempts, orders
from service.jobs.backends import Handle, Order, Status
from service.jobs.desk import Desk
from service.jobs.record import Record
from tests.service.job_specs import settings
from tests.service.memory_backend import Killed
from tests.service.stepped_service import Service

GPUS = {"gpus": 2, "cpus": 1}


@pytest.fixture
def service(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    # Another attempt does not wait.
    monkeypatch.setattr(attempts, "LONGEST_PAUSE_S", 0.0)
    made = Service(settings(tmp_path))
    yield made
    made.controller.stop(0)


def test_a_job_whose_run_was_deleted_is_stopped_and_forgotten_and_others_go_on(service: Service) -> None:
    deleted = service.submit()
    service.step()
    name = service.name(deleted)
    store.client().delete_run(deleted.id)
    with pytest.raises(TrackingError):
        service.desk.cancel(deleted.id)
    other = service.submit()
    service.step()
    assert service.backend.cancelled == [name]
    assert service.state(other) == "running"
    service.backend.end(name, 75)
    service.step()
    assert [job.id for job in service.desk.record.jobs()] == [other.id]
    assert service.backend.removed == [name]
    assert service.controller.problems == {}


def test_a_store_of_artifacts_that_is_away_keeps_neither_the_queue_nor_the_job_from_ending(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit()
    service.step()
    service.backend.end(service.name(job))

    def away(*_: object, **__: object) -> None:
        raise store.UnreachableError("500 from the bucket")

    monkeypatch.setattr(Record, "upload", away)
    other = service.submit()
    service.step()
    assert (service.state(job), service.state(other)) == ("running", "running")
    assert service.controller.problems == {}
    monkeypatch.setattr(attempts, "PATIENCE_S", 0.0)
    service.step()
    assert service.state(job) == "finished"
    assert "500 from the bucket" in service.desk.get(job.id).reason


def test_what_a_backend_refuses_of_one_job_is_that_jobs_alone(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "REFUSED_S", 0.0)
    bad = service.submit(retries=0)
    real = service.backend.start

    def start(order: Order) -> Handle:
        if order.job.id == bad.id:
            raise BackendError("minimum memory limit allowed is 6MB")
        return real(order)

    monkeypatch.setattr(service.backend, "start", start)
    service.step()
    other = service.submit()
    service.step()
    assert service.state(other) == "running"
    assert service.controller.problems == {}
    assert service.state(bad) == "starting"
    service.step(attempts.TRIES)
    assert service.state(bad) == "failed"
    assert "6MB" in service.desk.get(bad.id).reason


def test_what_runs_is_not_given_up_for_a_question_that_nobody_answers(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "REFUSED_S", 0.0)
    job = service.submit(retries=0)
    service.step()

    def unanswered(name: str, handle: Handle) -> Status:
        raise BackendError("the engine has lost its notes")

    with monkeypatch.context() as patch:
        patch.setattr(service.backend, "status", unanswered)
        service.step(attempts.TRIES + 2)
        assert (service.state(job), service.backend.cancelled) == ("running", [])
    service.backend.end(service.name(job))
    service.step()
    assert service.state(job) == "finished"


def test_a_start_that_is_given_up_is_stopped_first(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend has started it each time it said that it could not."""
    monkeypatch.setattr(attempts, "REFUSED_S", 0.0)
    job = service.submit(retries=0)
    real = service.backend.start

    def start(order: Order) -> Handle:
        real(order)
        raise BackendError("the answer was lost")

    monkeypatch.setattr(service.backend, "start", start)
    service.step(attempts.TRIES + 2)
    name = service.name(job)
    assert (service.state(job), set(service.backend.cancelled)) == ("starting", {name})
    service.backend.end(name, 143)
    service.step()
    assert (service.state(job), service.backend.removed) == ("failed", [name])
    assert "the answer was lost" in service.desk.get(job.id).reason


def test_what_does_not_stop_is_asked_again_when_it_should_have_been_killed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(attempts, "time", SimpleNamespace(monotonic=lambda: now_s[0], time=lambda: now_s[0]))
    job = service.submit(grace_s=30)
    service.step()
    service.desk.cancel(job.id)
    asked = []
    for later_s in (0, 20, 21, 20):
        now_s[0] += later_s
        service.step()
        asked.append(len(service.backend.cancelled))
    assert asked == [1, 1, 2, 2]


def test_a_job_that_is_cancelled_before_it_turns_out_that_it_cannot_start_is_killed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit()

    def refuse(*_: object) -> Order:
        service.desk.cancel(job.id)
        raise ConfigError("data.root: is not there any more")

    monkeypatch.setattr(orders, "order", refuse)
    service.step()
    assert (service.state(job), service.backend.starts.total()) == ("killed", 0)


def test_what_was_started_before_its_data_went_outside_goes_on(service: Service, tmp_path: Path) -> None:
    """The service is killed between the start and its note, and cannot order the job a second time."""
    (tmp_path / "data").mkdir()
    job = service.submit()
    service.backend.dies_after_start = True
    with contextlib.suppress(Killed):
        service.step()
    service.backend.dies_after_start = False
    assert (service.state(job), service.desk.get(job.id).attempts[-1].started_s) == ("starting", 0.0)
    (tmp_path / "data" / "demo").symlink_to("/etc")
    service.restart()
    service.step()
    assert (service.state(job), service.backend.running()) == ("running", [service.name(job)])


def test_a_full_disk_fails_no_job_and_starts_none(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.step()
    first, second = service.submit(), None

    def full(*_: object, **__: object) -> None:
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(orders, "prepare", full)
        patch.setattr(Desk, "try_storage", full)
        service.step()
        second = service.submit()
        service.step(attempts.TRIES + 2)
        assert (service.state(first), service.state(second)) == ("starting", "queued")
        assert "no space left" in service.controller.problems["storage"]
    service.step()
    assert (service.state(first), service.state(second)) == ("running", "running")
    assert service.controller.problems == {}


def test_a_start_that_breaks_unexpectedly_ends_the_attempt(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(order: Order) -> Handle:
        raise ValueError("embedded null byte")

    monkeypatch.setattr(service.backend, "start", broken)
    job = service.submit()
    service.step()
    assert service.state(job) == "failed"
    assert "ValueError: embedded null byte" in service.desk.get(job.id).reason


def test_a_job_of_a_backend_that_is_switched_off_waits_with_a_reason_and_can_be_cancelled(
    service: Service, tmp_path: Path
) -> None:
    started = service.submit()
    service.step()
    waiting = service.submit()
    service.controller.stop(0)
    service.settings = settings(tmp_path, backends={"local": {"enabled": False}})
    service.backends.clear()
    service.begin()
    service.step(2)
    assert "not set up" in service.desk.get(started.id).reason
    assert service.state(waiting) == "queued"
    assert "not set up" in service.desk.get(waiting.id).reason
    service.desk.cancel(started.id)
    service.step()
    assert service.state(started) == "killed"


def test_gpus_of_a_start_that_takes_long_are_given_to_nobody_else(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.controller._PATIENCE_S", 0.05)
    release, real = threading.Event(), run_creation.set_tags

    def slow(*given: Any) -> None:
        if threading.current_thread().name.startswith("lorot-local"):
            release.wait()
        real(*given)

    monkeypatch.setattr(run_creation, "set_tags", slow)
    service.step(0)
    jobs = [service.submit(resources=GPUS)]
    service.controller.step()
    jobs.append(service.submit(resources=GPUS))
    service.controller.step()
    release.set()
    service.step(2)
    given = [index for job in jobs for index in service.backend.orders[service.name(job)].gpus]
    assert sorted(given) == [0, 1, 2, 3]


def test_a_job_larger_than_the_machine_has_become_is_told_so_and_is_in_nobodys_way(
    service: Service, tmp_path: Path
) -> None:
    service.controller.stop(0)
    large = service.submit(resources={"gpus": 4, "cpus": 1})
    behind = service.submit(resources={"gpus": 2, "cpus": 1})
    service.settings = settings(tmp_path, gpus=2)
    service.begin()
    service.step()
    assert (service.state(large), service.state(behind)) == ("queued", "running")
    assert "there are 2" in service.desk.get(large.id).reason
    service.controller.stop(0)
    service.settings = settings(tmp_path, gpus=8)
    service.begin()
    service.step()
    assert (service.state(large), service.desk.get(large.id).reason) == ("running", "")


def test_what_was_seen_before_is_not_advanced_twice(service: Service) -> None:
    job = service.submit(retries=1)
    service.step()
    seen = service.desk.get(job.id)
    assert seen.attempt is not None
    service.backend.end(service.name(job), 1)
    service.step()
    moving = service.controller._attempts
    moving._end(seen, seen.attempt, Status("ended", exit_code=1))
    now = service.desk.get(job.id)
    assert (now.failures, len(now.attempts), now.attempts[-1].exit_code) == (1, 2, None)


def test_one_attempt_that_cannot_be_cleared_away_is_tried_again_and_keeps_no_other_waiting(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.controller._PROBE_S", 0.0)
    stuck, other = service.submit(), service.submit()
    service.step()
    stuck_name, real = service.name(stuck), service.backend.remove

    def remove(name: str, handle: Handle) -> None:
        if name == stuck_name:
            raise BackendError("device or resource busy")
        real(name, handle)

    with monkeypatch.context() as patch:
        patch.setattr(service.backend, "remove", remove)
        for job in (stuck, other):
            service.backend.end(service.name(job))
        service.step(2)
        assert (service.state(stuck), service.state(other)) == ("finished", "finished")
        assert service.controller.problems == {}
    service.step()
    assert service.backend.jobs == {}
