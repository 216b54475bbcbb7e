"""Runs that a server has made of one question: one stays, nobody loses the job they were told of, nobody waits."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from service import run_creation, store
from service.errors import TrackingError, UnknownJobError
from service.jobs import job_tags, runs, twins
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.job import Job
from service.jobs.record import Record
from service.jobs.twins import Twins
from tests.service.job_specs import settings, spec
from tests.service.memory_backend import MemoryBackend
from tests.service.stepped_service import Service
from tests.service.test_record_loading import copied, ended, following, is_deleted

AWAY = store.UnreachableError("nobody there")
REFUSED = TrackingError("you may not")


@pytest.fixture
def service(place: str, tmp_path: Path) -> Iterator[Service]:
    made = Service(settings(tmp_path))
    yield made
    made.controller.stop(0)


@pytest.fixture
def writer(place: str, tmp_path: Path) -> Record:
    return Record(settings(tmp_path))


def key_of(job: Job) -> str:
    return str(store.client().get_run(job.id).data.tags[job_tags.KEY])


def keep_from_deletion(patch: pytest.MonkeyPatch, run_id: str) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    real = MlflowClient.delete_run

    def delete(api: Any, asked: str) -> None:
        if asked == run_id:
            raise MlflowException("you may not", error_code=7)
        real(api, asked)

    patch.setattr(MlflowClient, "delete_run", delete)


def test_a_twin_that_may_not_be_deleted_is_not_started_and_keeps_nobody_else_waiting(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit()
    spare, other = copied(job, 5), service.submit(name="other")
    keep_from_deletion(monkeypatch, spare)
    service.restart()
    record = service.desk.record
    assert len(record.open_jobs()) == 3
    service.step(2)
    assert service.controller.problems == {}
    assert (service.state(job), service.state(other)) == ("running", "running")
    assert service.backend.starts.total() == 2
    record.load()
    assert {one.id for one in record.jobs()} == {job.id, other.id}
    assert record._twins.are_expected
    assert not is_deleted(spare)


def test_a_key_that_mlflow_refuses_to_look_for_is_left_for_later_and_the_others_are_not(
    writer: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = writer.create(spec(), key="one")[0], writer.create(spec(), key="two")[0]
    twin = copied(second, 5)
    real, bad = run_creation.sort_out, key_of(first)

    def refuse(uri: str, key: str, *given: Any) -> run_creation.Sorted:
        if key == bad:
            raise REFUSED
        return real(uri, key, *given)

    monkeypatch.setattr(run_creation, "sort_out", refuse)
    for key in (bad, key_of(second)):
        writer._twins.found(key)
    writer.sort_out()
    assert is_deleted(twin)
    assert set(writer._twins._late) == {bad}
    writer._twins.found(bad)
    monkeypatch.setattr(run_creation, "sort_out", lambda *_: (_ for _ in ()).throw(AWAY))
    with pytest.raises(store.UnreachableError):
        writer.sort_out()
    assert set(writer._twins._late) == {bad}


def test_whatever_somebody_has_written_for_a_key_jobs_are_read_and_started(service: Service) -> None:
    jobs = [service.submit(), service.submit()]
    for job in jobs:
        store.client().set_tag(job.id, job_tags.KEY, "it's/mine")
    service.restart()
    service.desk.record.is_read_beside = True
    service.step(2)
    assert [service.state(job) for job in jobs] == ["running", "running"]
    service.desk.record.load()
    with pytest.raises(TrackingError, match="is no key of a run"):
        run_creation.sort_out(service.desk.record.uri, "it's/mine", job_tags.rank)


@pytest.mark.parametrize("key", ["", "mine"])
def test_the_job_that_somebody_was_told_of_stays_though_mlflow_did_not_take_that_at_once(
    writer: Record, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    writer.load()
    real, left = run_creation._create_once, [1]

    def lose_the_first(*given: Any, **named: Any) -> run_creation.Made:
        if left.pop() if left else False:
            raise AWAY
        return real(*given, **named)

    def take_nothing(*_: Any) -> None:
        raise REFUSED

    monkeypatch.setattr(run_creation, "_create_once", lose_the_first)
    monkeypatch.setattr(run_creation.time, "sleep", lambda _: None)
    monkeypatch.setattr(twins, "LATE_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(run_creation, "set_tags", take_nothing)
        job, _ = writer.create(spec(), key=key)
        early = copied(job, -5)
        assert writer.is_sole(job.id)
    assert (is_deleted(early), is_deleted(job.id)) == (True, False)
    writer.sort_out()
    assert job_tags.rank(store.client().get_run(job.id).data.tags) == (False, True)
    assert writer.jobs() == [job]
    assert not writer._twins.are_expected


def test_while_twins_are_expected_the_one_that_goes_does_not_begin_and_the_one_that_stays_is_there(
    writer: Record,
) -> None:
    writer.load()
    job, _ = writer.create(spec())
    store.client().set_tag(job.id, job_tags.TOLD, "")
    stays = copied(job, -5)
    assert writer.is_sole(job.id)
    writer._twins.made("another", "", is_alone=False)
    assert not writer.is_sole(job.id)
    assert [one.id for one in writer.jobs()] == [stays]
    assert is_deleted(job.id)


def test_nobody_looks_at_a_key_while_a_run_of_it_is_made_nor_makes_one_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = Twins("sqlite:///nowhere.db")
    order: list[str] = []
    looking, making, may_end, may_make = (threading.Event() for _ in range(4))

    def sort_out(*_: object) -> run_creation.Sorted:
        looking.set()
        may_end.wait(60)
        order.append("looked")
        return run_creation.Sorted(None, (), None)

    def make(until: threading.Event) -> None:
        with found.making("a"):
            making.set()
            until.wait(60)
            order.append("made")

    monkeypatch.setattr(run_creation, "sort_out", sort_out)
    with ThreadPoolExecutor(3) as pool:
        look = pool.submit(found.sort_out, "a")
        assert looking.wait(60)
        made = pool.submit(make, may_end)
        with found.making("b"):
            assert not wait([made], 0.2).done
        may_end.set()
        wait([look, made])
        assert order == ["looked", "made"]
        making.clear()
        made = pool.submit(make, may_make)
        assert making.wait(60)
        look = pool.submit(found.sort_out, "a")
        assert not wait([look], 0.2).done
        may_make.set()
        wait([look, made])
    assert order[2:] == ["made", "looked"]


def test_it_is_late_a_while_after_the_answer_however_long_that_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(twins.time, "monotonic", lambda: now[0])
    found = Twins("sqlite:///nowhere.db")
    looked: list[str] = []

    def sort(key: str) -> run_creation.Sorted:
        looked.append(key)
        if looked == ["a"]:
            found.made(key, "2", is_alone=False)
        return run_creation.Sorted(None, (), None)

    def look() -> list[str]:
        looked.clear()
        found.look(sort, lambda: None, lambda: False)
        return looked.copy()

    def lose() -> None:
        with found.making("a"):
            now[0] += 500.0
            raise AWAY

    with pytest.raises(TrackingError):
        lose()
    assert look() == []
    now[0] += twins.LATE_S
    with found.making("a"):
        assert look() == []
        now[0] += 500.0
    assert look() == []
    now[0] += twins.LATE_S
    # Another one is made while this is looked at: its own time comes.
    assert look() == ["a"]
    assert found.are_expected
    assert look() == []
    now[0] += twins.LATE_S
    found.look(sort, lambda: None, lambda: True)
    looked.append("once")
    found.look(sort, lambda: None, lambda: False)
    assert looked[-1] == "a"
    assert not found.are_expected


def test_an_old_job_that_is_found_by_its_key_is_no_news(writer: Record) -> None:
    job, _ = writer.create(spec(), key="one")
    writer.change(job.id, state="killed", ended_s=5.0)
    fresh = following(writer)
    told: list[Job] = []
    fresh.listeners.append(told.append)
    assert fresh.create(spec(), key="one")[0].id == job.id
    assert told == []
    new, _ = fresh.create(spec(), key="two")
    assert told == [new]


def test_a_job_that_is_forgotten_while_it_is_read_does_not_come_back(
    writer: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ended(writer)
    fresh = following(writer)
    fresh.load_open()
    real = runs.one

    def slow(uri: str, run_id: str) -> list[runs.Found]:
        found = real(uri, run_id)
        fresh.load()
        fresh.drop(run_id)
        return found

    monkeypatch.setattr(runs, "one", slow)
    with pytest.raises(UnknownJobError):
        fresh.get(gone.id)
    assert fresh.jobs() == []


def test_the_end_waits_for_who_reads_and_all_that_is_read_is_told_once(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = Controller(Desk(settings(tmp_path, poll_s=0.01), backends={"local": MemoryBackend()}))
    real, reads, read = Record.load_more, threading.Event(), threading.Event()

    def slow(record: Record) -> bool:
        reads.set()
        controller._stopping.wait(60)
        return real(record)

    monkeypatch.setattr(Record, "load_more", slow)
    controller.on_read.append(read.set)
    controller.start()
    assert reads.wait(60)
    controller.stop(60)
    assert read.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "lorot-record"]
