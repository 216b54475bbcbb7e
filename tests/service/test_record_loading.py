"""Reading the record: open jobs first, the others by and by, and no job lost, stale or started twice meanwhile."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service import run_creation, store
from service.errors import StateError, TrackingError, UnknownJobError
from service.jobs import job_tags, runs, twins
from service.jobs.job import Attempt, Job
from service.jobs.record import Record
from tests.service.job_specs import settings, spec
from tests.service.stepped_service import Service


@pytest.fixture
def writer(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setattr(runs, "_PAGE", 2)
    return Record(settings(tmp_path))


@pytest.fixture
def service(place: str, tmp_path: Path) -> Iterator[Service]:
    made = Service(settings(tmp_path))
    yield made
    made.controller.stop(0)


def following(writer: Record) -> Record:
    """The next service's, which has not read anything and does that beside its work."""
    made = Record(writer._settings)
    made.is_read_beside = True
    return made


def ended(writer: Record, **fields: Any) -> Job:
    return writer.change(writer.create(spec(**fields))[0].id, state="killed", ended_s=5.0)


def copied(job: Job, shift_ms: int, **tags: str) -> str:
    """A run that a server has made of the same question, so much later than the job's own; its id."""
    run = store.client().get_run(job.id)
    own = {key: value for key, value in run.data.tags.items() if key != job_tags.TOLD}
    twin = store.client().create_run(job.experiment_id, start_time=run.info.start_time + shift_ms, tags=own | tags)
    return str(twin.info.run_id)


def is_deleted(run_id: str) -> bool:
    return bool(store.client().get_run(run_id).info.lifecycle_stage == "deleted")


def test_what_has_not_ended_is_there_at_once_and_the_rest_by_its_id_and_in_the_end_in_lists(writer: Record) -> None:
    old = [ended(writer) for _ in range(5)]
    waits, _ = writer.create(spec(name="waits"))
    runs_now = writer.change(writer.create(spec())[0].id, state="starting", attempts=(Attempt(1, "x"),))
    fresh = following(writer)
    assert {job.id for job in fresh.open_jobs()} == {waits.id, runs_now.id}
    assert fresh.jobs() == [runs_now, waits]
    assert fresh.is_partial
    assert fresh.get(old[0].id) == old[0]
    assert fresh.beginning_with(old[1].id[:9]) == [old[1]]
    for wrong in ("0" * 32, "%", "../" + old[0].id, old[0].id[:8]):
        with pytest.raises(UnknownJobError):
            fresh.get(wrong)
    assert fresh.beginning_with("%") == []
    while fresh.load_more():
        assert fresh.is_partial
    assert not fresh.is_partial
    assert fresh.jobs() == [runs_now, waits, *reversed(old)]


def test_who_reads_nothing_beside_sees_all_at_the_first_look(writer: Record) -> None:
    old = [ended(writer) for _ in range(5)]
    alone = Record(writer._settings)
    assert alone.get(old[2].id) == old[2]
    assert alone.jobs() == [*reversed(old)]


def test_the_tag_decides_what_is_open_whatever_the_status_says(writer: Record) -> None:
    waits, over = writer.create(spec())[0], ended(writer)
    store.client().update_run(waits.id, status="FINISHED")
    store.client().update_run(over.id, status="RUNNING")
    fresh = following(writer)
    assert fresh.open_jobs() == [waits]
    fresh.settle()
    assert store.client().get_run(waits.id).info.status == "SCHEDULED"
    assert store.client().get_run(over.id).info.status == "RUNNING"
    fresh.load()
    fresh.settle()
    assert store.client().get_run(over.id).info.status == "KILLED"


@pytest.mark.parametrize("shifts", [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 9, 9], [7, 0, 0, 0, 0, 0, 0]])
def test_pages_have_every_run_once_though_some_are_made_and_deleted_meanwhile(
    writer: Record, shifts: list[int]
) -> None:
    job = ended(writer)
    made = {copied(job, 1000 + shift, **{job_tags.KEY: f"/{number}"}) for number, shift in enumerate(shifts)}
    pages = runs.Pages(writer.uri)
    found = [one.job.id for one in pages.read()]
    late = copied(job, 5000, **{job_tags.KEY: "/late"})
    if len(set(shifts)) == len(shifts):
        # Of one and the same moment more than a page has: there a number is all that MLflow goes on by.
        store.client().delete_run(found[0])
    found += [one.job.id for one in runs.everything(pages)]
    assert sorted(found) == sorted({*made, job.id})
    assert late not in found


def test_a_change_while_a_page_is_on_its_way_is_not_undone_by_what_the_page_says(
    writer: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, gone = ended(writer), ended(writer)
    fresh = following(writer)
    fresh.load_open()
    real = runs.Pages.read

    def slow(pages: runs.Pages) -> list[runs.Found]:
        found = real(pages)
        fresh.change(old.id, state="queued")
        store.client().delete_run(gone.id)
        fresh.drop(gone.id)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(runs.Pages, "read", slow)
        fresh.load_more()
    fresh.load()
    assert [job.state for job in fresh.jobs()] == ["queued"]
    assert [job.id for job in fresh.open_jobs()] == [old.id]


def test_a_page_that_could_not_be_read_is_read_the_next_time(writer: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [ended(writer) for _ in range(5)]
    fresh = following(writer)
    fresh.load_more()
    with monkeypatch.context() as patch:
        patch.setattr(store, "client", lambda *_: (_ for _ in ()).throw(store.UnreachableError("nobody there")))
        with pytest.raises(TrackingError):
            fresh.load_more()
    fresh.load()
    assert fresh.jobs() == [*reversed(old)]


def test_the_key_of_a_job_that_was_not_read_yet_makes_no_second_one_wherever_that_would_be(writer: Record) -> None:
    job, _ = writer.create(spec(), owner="ada", key="one")
    over = writer.change(job.id, state="killed", ended_s=5.0)
    for number, other in enumerate((spec(), spec(name="other"), spec(experiment="elsewhere"))):
        fresh = following(writer)
        fresh.load_open()
        if number == 0:
            assert fresh.create(other, owner="ada", key="one") == (over, False)
        else:
            with pytest.raises(StateError, match="'one' has been used"):
                fresh.create(other, owner="ada", key="one")
        fresh.load()
        assert fresh.jobs() == [over]


def test_a_twin_of_a_job_that_was_not_read_yet_is_not_started(service: Service) -> None:
    job = service.submit()
    service.step()
    service.backend.end(service.name(job))
    service.step(2)
    assert service.state(job) == "finished"
    twin = copied(job, -5, **job_tags.encode(Job("", "", job.spec, "queued", submitted_s=1.0, queued_s=1.0)))
    other = service.submit(name="other")
    service.restart()
    service.desk.record.is_read_beside = True
    assert {one.id for one in service.desk.record.open_jobs()} == {twin, other.id}
    service.step(2)
    assert service.desk.record.is_partial
    assert service.state(other) == "running"
    assert (service.backend.starts.total(), is_deleted(twin)) == (2, True)
    assert [one.id for one in service.desk.record.open_jobs()] == [other.id]
    service.desk.record.load()
    assert [one.id for one in service.desk.record.jobs()] == [other.id, job.id]


def test_asking_again_with_a_key_leaves_the_twin_alone_that_has_begun(writer: Record) -> None:
    job, _ = writer.create(spec(), key="one")
    writer.change(job.id, state="starting", attempts=(Attempt(1, "x"),))
    begun = writer.change(job.id, state="finished", ended_s=5.0)
    early = copied(job, -5, **job_tags.encode(Job("", "", job.spec, "queued", key="one")))
    fresh = following(writer)
    assert [one.id for one in fresh.open_jobs()] == [early]
    assert fresh.create(spec(), key="one") == (begun, False)
    assert (is_deleted(early), is_deleted(job.id)) == (True, False)


@pytest.mark.parametrize("key", ["", "mine"])
def test_a_twin_that_comes_after_an_unanswered_creation_is_deleted_without_a_restart(
    writer: Record, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    writer.load()
    real, left = run_creation._create_once, [1]

    def lose_the_first(*given: Any, **named: Any) -> run_creation.Made:
        if left.pop() if left else False:
            raise store.UnreachableError("nobody there")
        return real(*given, **named)

    monkeypatch.setattr(run_creation, "_create_once", lose_the_first)
    monkeypatch.setattr(run_creation.time, "sleep", lambda _: None)
    monkeypatch.setattr(twins, "LATE_S", 0.0)
    job, is_new = writer.create(spec(), key=key)
    twin = copied(job, -5)
    writer.sort_out()
    assert is_new
    assert (is_deleted(twin), is_deleted(job.id)) == (True, False)
    assert writer.jobs() == [job]


def test_a_round_looks_for_twins_when_their_time_has_come(service: Service) -> None:
    service.desk.record.load()
    job = service.submit()
    service.step()
    twin = copied(job, -5, **job_tags.encode(Job("", "", job.spec, "queued")))
    key = str(store.client().get_run(job.id).data.tags[job_tags.KEY])
    service.desk.record._twins.made(key, job.id, is_alone=False)
    service.step()
    assert not is_deleted(twin)
    service.desk.record._twins.found(key)
    service.step()
    assert is_deleted(twin)
    assert service.state(job) == "running"
