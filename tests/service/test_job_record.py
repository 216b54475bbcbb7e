"""The record of jobs: MLflow's runs, which a second process must read as the first one wrote them."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from service import run_creation, store
from service.errors import ConfigError, StateError, TrackingError, UnknownJobError
from service.jobs import job_tags
from service.jobs.job import Attempt, Job
from service.jobs.record import Record
from service.jobs.spec import JobSpec
from tests.service.job_specs import settings, spec

AWAY = store.UnreachableError("nobody there")


@pytest.fixture
def record(place: str, tmp_path: Path) -> Record:
    return Record(settings(tmp_path))


def again(record: Record) -> Record:
    """As the next process reads it."""
    return Record(record._settings)


def test_a_job_is_a_run_that_is_scheduled_and_another_process_reads_it_as_it_was_written(record: Record) -> None:
    job, is_new = record.create(spec(name="first", priority=3), owner="ada", key="k/1 'x'")
    run = store.client().get_run(job.id)
    assert is_new
    assert (run.info.status, run.info.run_name) == ("SCHEDULED", "first")
    assert again(record).jobs() == [job]
    attempt = Attempt(1, "lorot-x-1", {"gpus": [0], "id": "é"}, 1.5, 2.5, 0, "because", "sha256:ab")
    record.change(job.id, state="starting", attempts=(attempt,))
    ended = record.change(
        job.id, state="failed", reason="it broke\x00", failures=2, cancel=True, resume=True, ended_s=7.0, queued_s=3.25
    )
    read = again(record).get(job.id)
    assert read == replace(ended, reason="it broke\ufffd")
    assert (read.owner, read.key) == ("ada", "k/1 'x'")
    assert store.client().get_run(job.id).info.status == "FAILED"


def test_the_same_key_gives_the_same_job_after_a_restart_too_and_an_owner_has_keys_of_its_own(record: Record) -> None:
    job, _ = record.create(spec(), owner="ada", key="one")
    assert record.create(spec(), owner="ada", key="one") == (job, False)
    assert again(record).create(spec(), owner="ada", key="one") == (job, False)
    other, is_new = record.create(spec(), owner="bob", key="one")
    assert is_new
    assert other.id != job.id
    assert len(again(record).jobs()) == 2


def test_the_same_key_with_another_spec_is_refused(record: Record) -> None:
    record.create(spec(name="a"), key="one")
    for place in (record, again(record)):
        with pytest.raises(StateError, match="'one' has been used"):
            place.create(spec(name="b"), key="one")


def test_two_requests_at_once_make_one_job_in_one_process_and_in_two(record: Record) -> None:
    record.load()
    other = again(record)
    other.load()
    barrier = threading.Barrier(6)

    def ask(place: Record) -> tuple[str, bool]:
        barrier.wait()
        job, is_new = place.create(spec(), owner="ada", key="same")
        return job.id, is_new

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, [record, other] * 3))
    assert len({job_id for job_id, _ in found}) == 1
    assert sum(is_new for _, is_new in found) == 1
    assert len(again(record).jobs()) == 1


@pytest.mark.parametrize("given", ["lost", ""], ids=["own key", "told key"])
def test_a_job_whose_making_was_never_answered_is_found_by_its_key(
    record: Record, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    record.load()
    real = run_creation._create_once
    monkeypatch.setattr(run_creation, "_ATTEMPTS", 1)

    def lose_the_answer(*given: object, **named: object) -> object:
        real(*given, **named)  # type: ignore[arg-type]
        raise AWAY

    monkeypatch.setattr(run_creation, "_create_once", lose_the_answer)
    with pytest.raises(TrackingError) as refusal:
        record.create(spec(), key=given)
    monkeypatch.setattr(run_creation, "_create_once", real)
    told = re.search(r"sent again with the key '(\w+)'", str(refusal.value))
    job, is_new = record.create(spec(), key=given or told[1])  # type: ignore[index]
    assert not is_new
    assert again(record).jobs() == [job]


def delete_the_experiment(job: Job) -> None:
    store.client().delete_experiment(store.client().get_run(job.id).info.experiment_id)


@pytest.mark.parametrize("given", ["mine", ""], ids=["own key", "told key"])
def test_a_job_that_mlflow_refuses_is_refused_and_nobody_waits_for_it_nor_sends_it_again(
    record: Record, given: str
) -> None:
    record.load()
    delete_the_experiment(record.create(spec())[0])
    with pytest.raises(TrackingError, match=r"was deleted in .* choose another name") as refusal:
        record.create(spec(), key=given)
    assert not isinstance(refusal.value, store.UnreachableError)
    assert "sent again" not in str(refusal.value)
    assert not record._twins.are_expected


@pytest.mark.parametrize("given", ["mine", ""], ids=["own key", "told key"])
def test_a_job_that_is_refused_after_a_lost_answer_may_be_there_all_the_same(
    record: Record, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    record.load()
    first, _ = record.create(spec())
    real = run_creation._create_once

    def lose_the_answer(*given: object, **named: object) -> object:
        real(*given, **named)  # type: ignore[arg-type]
        delete_the_experiment(first)
        raise AWAY

    monkeypatch.setattr(run_creation, "_create_once", lose_the_answer)
    monkeypatch.setattr(run_creation.time, "sleep", lambda _: None)
    with pytest.raises(store.UnreachableError, match="was deleted in") as refusal:
        record.create(spec(), key=given)
    assert ("sent again with the key" in str(refusal.value)) is (not given)
    assert record._twins.are_expected


def test_a_run_that_a_server_made_twice_is_one_job_after_the_next_start(record: Record) -> None:
    job, _ = record.create(spec())
    run = store.client().get_run(job.id)
    twin = store.client().create_run(run.info.experiment_id, start_time=run.info.start_time + 5, tags=run.data.tags)
    assert [one.id for one in again(record).jobs()] == [job.id]
    assert store.client().get_run(twin.info.run_id).info.lifecycle_stage == "deleted"


def test_states_move_only_where_they_may(record: Record) -> None:
    job, _ = record.create(spec())
    with pytest.raises(StateError, match="is queued; it cannot become running"):
        record.change(job.id, state="running")
    record.change(job.id, state="killed")
    with pytest.raises(StateError):
        record.change(job.id, state="finished")
    with pytest.raises(UnknownJobError):
        record.change("0" * 32, state="killed")


def test_what_mlflow_does_not_take_changes_nothing(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = record.create(spec())
    told: list[Job] = []
    record.listeners.append(told.append)

    def refuse(*_: object) -> None:
        raise AWAY

    with monkeypatch.context() as patch:
        patch.setattr(run_creation, "set_tags", refuse)
        with pytest.raises(TrackingError):
            record.change(job.id, state="killed")
    assert record.get(job.id) == job
    assert told == []
    record.change(job.id, state="killed")
    assert [one.state for one in told] == ["killed"]


def test_a_status_that_could_not_be_set_is_set_later_and_by_the_next_process(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = record.create(spec())
    with monkeypatch.context() as patch:
        patch.setattr(Record, "_settle", lambda *_: (_ for _ in ()).throw(AWAY))
        record.change(job.id, state="killed", ended_s=5.0)
    assert store.client().get_run(job.id).info.status == "SCHEDULED"
    following = again(record)
    following.load()
    following.settle()
    assert store.client().get_run(job.id).info.status == "KILLED"
    # Whose workers have a late word in it.
    store.client().update_run(job.id, status="RUNNING")
    last = again(record)
    last.load()
    last.settle()
    assert store.client().get_run(job.id).info.status == "KILLED"


def test_a_listener_that_fails_is_in_nobodys_way(record: Record) -> None:
    told: list[Job] = []
    record.listeners += [lambda job: 1 / 0, told.append]  # type: ignore[list-item]
    job, _ = record.create(spec())
    assert told == [job]


def test_foreign_and_damaged_runs_are_left_alone(record: Record) -> None:
    job, _ = record.create(spec())
    api = store.client()
    api.create_run(job.experiment_id)
    damaged = api.create_run(job.experiment_id, tags={"lorot.job": "1", "lorot.job.state": "asleep"})
    assert [one.id for one in again(record).jobs()] == [job.id]
    assert api.get_run(damaged.info.run_id).data.tags["lorot.job.state"] == "asleep"


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(
    config=st.dictionaries(
        texts, st.recursive(st.none() | st.booleans() | st.integers() | texts, st.lists), max_size=4
    ),
    long=st.integers(0, 30_000),
    attempts=st.lists(st.builds(Attempt, st.integers(1, 99), texts, exit_code=st.none() | st.integers()), max_size=4),
)
@examples(max_examples=25, deadline=None)
def test_tags_hold_any_job_in_pieces_that_mlflow_takes(
    config: dict[str, object], long: int, attempts: list[Attempt]
) -> None:
    given_spec = JobSpec(config={**config, "filler": "x" * long})
    job = Job("a" * 32, "1", given_spec, "queued", attempts=tuple(attempts))
    tags = job_tags.encode(job)
    assert all(len(value) <= 8000 and value.isascii() for value in tags.values())
    assert job_tags.decode(job.id, "1", tags) == job
    shorter = replace(job, spec=JobSpec(), attempts=())
    after = tags | job_tags.changed(job, shorter)
    assert job_tags.decode(job.id, "1", after) == shorter


@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_no_two_clients_share_a_key(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (job_tags.run_key(*one) == job_tags.run_key(*other)) == (one == other)
    assert job_tags.client_key(job_tags.run_key(*one)) == one
    assert not set(job_tags.run_key(*one)) & set("'\"` ")


def test_a_key_or_a_description_that_the_record_cannot_hold_is_refused(record: Record) -> None:
    with pytest.raises(ConfigError, match="200 at most"):
        record.create(spec(), key="k" * 201)
    with pytest.raises(ConfigError, match="characters"):
        record.create(JobSpec(config={"x": "y" * 600_000}))


def test_a_write_whose_answer_was_lost_leaves_nothing_behind_after_the_next(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = record.create(spec())
    real = run_creation.set_tags

    def lose_the_answer(*given: object) -> None:
        real(*given)  # type: ignore[arg-type]
        raise AWAY

    many = tuple(Attempt(number, "x" * 900) for number in range(1, 20))
    with monkeypatch.context() as patch:
        patch.setattr(run_creation, "set_tags", lose_the_answer)
        with pytest.raises(TrackingError):
            record.change(job.id, state="starting", attempts=many, cancel=True, reason="lost")
    assert again(record).get(job.id).state == "starting"
    after = record.change(job.id, failures=1)
    assert (after.state, after.cancel, after.attempts) == ("queued", False, ())
    assert again(record).get(job.id) == after


def test_a_second_load_forgets_nothing(record: Record) -> None:
    record.load()
    job, _ = record.create(spec())
    store.client().set_tag(job.id, "lorot.job.state", "asleep")
    record.load()
    assert record.jobs() == [job]


def test_one_run_that_is_refused_keeps_no_other_status_from_being_set(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = sorted((record.create(spec())[0] for _ in range(3)), key=lambda job: job.id)
    with monkeypatch.context() as patch:
        patch.setattr(Record, "_settle", lambda *_: (_ for _ in ()).throw(AWAY))
        for job in jobs:
            record.change(job.id, state="killed", ended_s=5.0)
    store.client().delete_run(jobs[0].id)
    record.settle()
    assert [store.client().get_run(job.id).info.status for job in jobs[1:]] == ["KILLED", "KILLED"]
    assert record.doubted() == [record.get(jobs[0].id)]


def test_of_twins_the_one_that_the_client_was_told_of_stays_though_the_other_was_asked_for_earlier(
    record: Record,
) -> None:
    job, _ = record.create(spec(), key="one")
    run = store.client().get_run(job.id)
    tags = {key: value for key, value in run.data.tags.items() if key != job_tags.TOLD}
    late = store.client().create_run(run.info.experiment_id, start_time=run.info.start_time - 5, tags=tags)
    assert [one.id for one in again(record).jobs()] == [job.id]
    assert store.client().get_run(late.info.run_id).info.lifecycle_stage == "deleted"
    record.change(job.id, state="starting", attempts=(Attempt(1, "x"),))
    later = store.client().create_run(run.info.experiment_id, start_time=run.info.start_time - 5, tags=tags)
    assert [one.id for one in again(record).jobs()] == [job.id]
    assert store.client().get_run(later.info.run_id).info.lifecycle_stage == "deleted"


def test_of_many_who_change_a_job_at_once_none_is_overlooked(record: Record) -> None:
    job = record.create(spec())[0]
    threads = [
        threading.Thread(target=lambda: [record.update(job.id, lambda now: {"failures": now.failures + 1})])
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert record.get(job.id).failures == 20


def test_a_run_that_the_database_has_never_heard_of_was_deleted_by_nobody(record: Record) -> None:
    job = record.create(spec())[0]
    assert not record.is_deleted("0" * 32)
    assert not record.is_deleted(job.id)
    store.client().delete_run(job.id)
    assert record.is_deleted(job.id)
