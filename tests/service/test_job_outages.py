"""The loop where MLflow, a backend or a store is away or slow: nothing is lost, and others are not kept waiting."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import pytest

from service import run_creation, store
from service.errors import TrackingError
from service.jobs import attempts, controller
from service.jobs.backends import Status
from service.jobs.record import Record
from tests.service.job_specs import settings
from tests.service.memory_backend import MemoryBackend
from tests.service.stepped_service import Service, away


@pytest.fixture
def service(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    # Another attempt does not wait.
    monkeypatch.setattr(attempts, "LONGEST_PAUSE_S", 0.0)
    made = Service(settings(tmp_path))
    yield made
    made.controller.stop(0)


def test_while_mlflow_is_away_nothing_starts_and_what_runs_goes_on_and_is_recorded_later(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = service.submit()
    service.step()
    waiting = service.submit()

    with monkeypatch.context() as patch:
        patch.setattr(run_creation, "set_tags", away)
        patch.setattr(Record, "ask", away)
        patch.setattr(Record, "upload", away)
        service.backend.end(service.name(running))
        service.step(3)
        assert (service.state(running), service.state(waiting)) == ("running", "queued")
        assert "nobody there" in service.controller.problems["mlflow"]
        assert not service.controller.is_well
        assert service.backend.starts.total() == 1
        with pytest.raises(TrackingError):
            service.desk.cancel(waiting.id)
    service.step()
    assert (service.state(running), service.state(waiting)) == ("finished", "running")
    assert service.controller.problems == {}
    assert service.controller.is_well


def test_a_status_that_mlflow_did_not_take_is_put_right_in_a_later_round(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit()

    with monkeypatch.context() as patch:
        patch.setattr(Record, "_settle", away)
        service.desk.cancel(job.id)
    assert store.client().get_run(job.id).info.status == "SCHEDULED"
    service.step()
    assert store.client().get_run(job.id).info.status == "KILLED"


def test_a_service_that_starts_before_mlflow_is_there_begins_when_it_is(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit()

    with monkeypatch.context() as patch:
        patch.setattr(store, "ensure_ready", away)
        service.restart()
        service.step()
        assert not service.controller.is_well
    service.step()
    assert service.state(job) == "running"
    assert service.controller.is_well


def test_the_jobs_of_a_backend_that_is_away_stay_as_they_are_and_others_go_on(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.controller._PROBE_S", 0.0)
    docker = MemoryBackend("docker")
    service = Service(settings(tmp_path), local=MemoryBackend(), docker=docker)
    there = service.submit(backend="docker")
    service.step()
    docker.away = True
    docker.now.clear()
    local, waiting = service.submit(), None
    service.step(4)
    assert (service.state(there), service.state(local)) == ("running", "running")
    assert "does not answer" in service.controller.problems["docker"]
    docker.away = False
    waiting = service.submit(backend="docker")
    docker.now[service.name(there)] = Status("running")
    service.step(2)
    assert (service.state(there), service.state(waiting)) == ("running", "running")
    assert service.controller.problems == {}
    assert service.desk.get(there.id).failures == 0
    service.controller.stop(0)


def test_what_waits_for_a_backend_that_is_away_stays_in_the_queue_and_can_be_cancelled_at_once(
    place: str, tmp_path: Path
) -> None:
    docker = MemoryBackend("docker")
    service = Service(settings(tmp_path), local=MemoryBackend(), docker=docker)
    service.submit(backend="docker")
    service.step()
    waiting = service.submit(backend="docker")
    docker.away = True
    service.step(2)
    assert (service.state(waiting), service.desk.get(waiting.id).attempts) == ("queued", ())
    assert service.desk.cancel(waiting.id).state == "killed"
    service.controller.stop(0)


def test_one_call_that_hangs_keeps_no_other_job_waiting(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.controller._PATIENCE_S", 0.05)
    slow, quick = service.submit(), service.submit()
    while {service.state(slow), service.state(quick)} != {"running"}:
        service.step()
    release = service.backend.hangs[service.name(slow)] = threading.Event()
    try:
        service.step(20)
        service.backend.end(service.name(quick))
        for _ in range(5):
            if quick.id in service.controller._busy:
                wait([service.controller._busy[quick.id]], 60)
            service.step()
        assert (service.state(quick), service.state(slow)) == ("finished", "running")
        assert sum(thread.name.startswith("lorot-local") for thread in threading.enumerate()) <= 6
    finally:
        release.set()
        del service.backend.hangs[service.name(slow)]


def test_a_backend_whose_calls_all_hang_keeps_no_other_backend_waiting(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.controller._PATIENCE_S", 0.05)
    docker = MemoryBackend("docker")
    service = Service(settings(tmp_path, cpus=64.0), local=MemoryBackend(), docker=docker)
    slow = [service.submit(backend="docker") for _ in range(12)]
    while {service.state(job) for job in slow} != {"running"}:
        service.step()
    release = threading.Event()
    docker.hangs = {service.name(job): release for job in slow}
    try:
        service.step(2)
        quick = service.submit()
        for _ in range(5):
            service.step()
            if quick.id in service.controller._busy:
                wait([service.controller._busy[quick.id]], 60)
        assert service.state(quick) == "running"
    finally:
        release.set()
        docker.hangs = {}
        service.controller.stop()


def test_a_service_that_has_nothing_to_record_notices_all_the_same_that_mlflow_is_away(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, asked = [1000.0], []

    def away(*_: object) -> None:
        asked.append(now_s[0])
        raise store.UnreachableError("nobody there")

    service.step()
    monkeypatch.setattr(controller, "time", SimpleNamespace(monotonic=lambda: now_s[0], time=time.time))
    service.controller._asked["mlflow"] = now_s[0]
    with monkeypatch.context() as patch:
        patch.setattr(Record, "ask", away)
        service.step(3)
        assert asked == []
        assert service.controller.is_well
        now_s[0] += controller._ASK_S
        service.step()
        assert asked == [now_s[0]]
        assert not service.controller.is_well
    service.step()
    assert service.controller.is_well


def test_a_service_with_nothing_to_do_notices_that_results_cannot_be_written_and_that_they_can_be_again(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(controller, "time", SimpleNamespace(monotonic=lambda: now_s[0], time=time.time))
    service.restart()
    service.step()
    assert service.controller.is_well
    (tmp_path / "jobs").rmdir()
    (tmp_path / "jobs").write_text("no folder")
    service.step()
    assert service.controller.is_well
    now_s[0] += controller._ASK_S
    service.step()
    assert not service.controller.is_well
    assert "change `results`" in service.controller.problems["storage"]
    (tmp_path / "jobs").unlink()
    service.step()
    assert service.controller.is_well
    # Where nothing can be left, that is said from the first round on.
    (tmp_path / "jobs").rmdir()
    (tmp_path / "jobs").write_text("no folder")
    service.restart()
    service.step()
    assert service.controller.problems.keys() == {"storage"}


def test_an_outage_of_mlflow_uses_up_no_patience_with_the_store_of_artifacts(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(attempts, "time", SimpleNamespace(monotonic=lambda: now_s[0], time=lambda: now_s[0]))
    job = service.submit()
    service.step()
    service.backend.end(service.name(job))

    with monkeypatch.context() as uploads:
        uploads.setattr(Record, "upload", away)
        with monkeypatch.context() as everything:
            everything.setattr(run_creation, "set_tags", away)
            everything.setattr(Record, "ask", away)
            service.step()
        now_s[0] += 2 * attempts.PATIENCE_S
        service.step()
        assert service.state(job) == "running"
    service.step()
    assert (service.state(job), service.desk.get(job.id).reason) == ("finished", "")


def test_a_store_that_takes_no_artifacts_keeps_no_job_from_ending(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit()
    service.step()
    service.backend.end(service.name(job))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("the bucket is closed")

    monkeypatch.setattr(Record, "upload", refuse)
    service.step(2)
    assert service.state(job) == "running"
    monkeypatch.setattr(attempts, "PATIENCE_S", 0.0)
    service.step()
    assert service.state(job) == "finished"
    assert "the bucket is closed" in service.desk.get(job.id).reason


def test_jobs_that_fail_at_once_wait_longer_and_longer_and_let_others_pass(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "LONGEST_PAUSE_S", 1000.0)
    # The first pause is a second long: it does not end by itself.
    monkeypatch.setattr(attempts, "time", SimpleNamespace(monotonic=lambda: 0.0, time=time.time))
    job = service.submit(retries=5)
    service.step()
    service.backend.end(service.name(job), 1)
    service.step(3)
    assert service.state(job) == "queued"
    other = service.submit()
    service.step()
    assert service.state(other) == "running"
