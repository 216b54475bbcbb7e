"""The loop: whatever is killed, away or slow, each attempt is started once and no job is lost."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service import run_creation, store
from service.errors import StateError, TakenError
from service.jobs import attempts, orders
from service.jobs.backends import Status
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.job import KEPT_ATTEMPTS
from service.jobs.record import Record
from service.jobs.spec import JobSpec
from tests.service.job_specs import settings, spec
from tests.service.memory_backend import Killed, MemoryBackend
from tests.service.stepped_service import Service


@pytest.fixture
def service(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    # Another attempt does not wait.
    monkeypatch.setattr(attempts, "LONGEST_PAUSE_S", 0.0)
    made = Service(settings(tmp_path))
    yield made
    made.controller.stop(0)


def test_a_job_goes_from_the_queue_to_its_end_and_mlflow_follows(service: Service) -> None:
    job = service.submit()
    service.step()
    assert service.state(job) == "running"
    assert store.client().get_run(job.id).info.status == "RUNNING"
    service.step()
    service.backend.end(service.name(job))
    service.step()
    ended = service.desk.get(job.id)
    assert (ended.state, ended.attempts[0].exit_code, ended.ended_s) == ("finished", 0, 2.0)
    run = store.client().get_run(job.id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", 2000)
    assert [one.path for one in store.client().list_artifacts(job.id)] == ["job.yaml"]
    assert service.backend.starts.total() == 1
    assert service.backend.removed == [f"lorot-{job.id[:12]}-1"]


def test_a_failure_is_retried_from_the_last_checkpoint_within_the_budget(service: Service) -> None:
    job = service.submit(retries=2)
    service.step()
    for number in (1, 2, 3):
        assert service.name(job) == f"lorot-{job.id[:12]}-{number}"
        assert ("--resume" in service.backend.orders[service.name(job)].command) == (number > 1)
        service.backend.end(service.name(job), 1)
        service.step()
    ended = service.desk.get(job.id)
    assert (ended.state, ended.failures, len(ended.attempts)) == ("failed", 3, 3)
    assert "2 are retried" in ended.reason
    assert service.backend.starts.total() == 3


def test_bad_input_is_not_retried_and_a_stop_from_outside_does_not_count(service: Service) -> None:
    bad, stopped = service.submit(), service.submit(retries=0)
    service.step()
    service.backend.end(service.name(bad), 2)
    service.backend.end(service.name(stopped), 75)
    service.step()
    assert (service.state(bad), service.state(stopped)) == ("failed", "running")
    assert service.desk.get(stopped.id).failures == 0


def test_what_has_vanished_is_looked_for_twice_and_then_started_again(service: Service) -> None:
    job = service.submit()
    service.step()
    del service.backend.now[service.name(job)]
    service.step()
    assert service.name(job).endswith("-1")
    service.step()
    assert service.name(job).endswith("-2")
    assert service.desk.get(job.id).failures == 1


def test_a_job_whose_work_was_done_before_its_last_process_was_killed_has_finished(service: Service) -> None:
    job = service.submit(retries=0)
    service.step()
    run = service.desk.settings.results / job.id / orders.RUN
    run.mkdir(exist_ok=True)
    (run / "end.json").write_text('{"time_ns": 1}')
    del service.backend.now[service.name(job)]
    service.step(2)
    ended = service.desk.get(job.id)
    assert (ended.state, ended.reason, ended.failures) == ("finished", "", 0)
    assert [attempt.exit_code for attempt in ended.attempts] == [0]


def test_more_never_run_at_once_than_there_is_room_for_and_each_gpu_has_one_job(service: Service) -> None:
    jobs = [service.submit(resources={"gpus": 2, "cpus": 1}) for _ in range(5)]
    for done in range(5):
        service.step(2)
        running = [service.desk.get(job.id) for job in jobs if service.state(job) == "running"]
        gpus = [index for job in running for index in service.backend.orders[service.name(job)].gpus]
        assert len(running) == min(2, 5 - done)
        assert len(gpus) == len(set(gpus))
        service.restart()
        service.backend.end(service.name(running[0]))
        service.step()
    assert [service.state(job) for job in jobs] == ["finished"] * 5
    assert service.backend.most_at_once == 2
    assert service.backend.starts.total() == 5


def test_two_jobs_of_all_the_memory_run_one_after_the_other(service: Service) -> None:
    first, second = (service.submit(resources={"cpus": 1, "memory": "64GB"}) for _ in range(2))
    beside = service.submit()
    service.step()
    assert [service.state(job) for job in (first, second, beside)] == ["running", "queued", "running"]
    service.backend.end(service.name(first))
    service.step(2)
    assert service.state(second) == "running"


def test_a_cancelled_job_is_stopped_once_and_ends_killed(service: Service) -> None:
    job = service.submit()
    service.step()
    service.desk.cancel(job.id)
    service.step(3)
    assert (service.state(job), service.backend.cancelled) == ("stopping", [service.name(job)])
    service.backend.end(service.name(job), 75)
    service.step()
    assert (service.state(job), service.desk.get(job.id).reason) == ("killed", "cancelled")
    assert store.client().get_run(job.id).info.status == "KILLED"


def test_a_job_cancelled_while_its_place_is_being_made_never_runs(service: Service) -> None:
    service.step()
    job = service.submit()
    service.backend.away = True
    service.step()
    assert service.state(job) == "starting"
    service.desk.cancel(job.id)
    service.backend.away = False
    service.step()
    assert service.state(job) == "killed"
    assert service.backend.starts.total() == 0


def test_a_job_that_finished_before_it_could_be_stopped_has_finished(service: Service) -> None:
    job = service.submit()
    service.step()
    service.desk.cancel(job.id)
    service.backend.end(service.name(job), 0)
    service.step()
    assert service.state(job) == "finished"


def test_of_more_attempts_than_are_kept_the_last_ones_stay_with_their_numbers_in_memory_and_in_the_record(
    service: Service,
) -> None:
    job = service.submit(retries=0)
    service.step()
    service.backend.end(service.name(job), 1)
    service.step()
    only = service.desk.get(job.id).attempt
    assert only is not None
    many = tuple(replace(only, number=number, name=f"{only.name}{number}") for number in range(1, 52))
    service.desk.record.change(job.id, attempts=many[-KEPT_ATTEMPTS:])
    service.desk.resume(job.id)
    service.step()
    found = service.desk.get(job.id)
    assert [attempt.number for attempt in found.attempts] == list(range(3, 53))
    service.restart()
    assert service.desk.get(job.id).attempts == found.attempts


def test_resume_and_retry_by_hand_make_a_further_attempt(service: Service) -> None:
    job = service.submit(retries=0)
    service.step()
    service.backend.end(service.name(job), 1)
    service.step()
    service.desk.resume(job.id)
    service.step()
    assert "--resume" in service.backend.orders[service.name(job)].command
    service.backend.end(service.name(job), 1)
    service.step()
    service.desk.retry(job.id)
    service.step()
    assert "--resume" not in service.backend.orders[service.name(job)].command
    assert [attempt.number for attempt in service.desk.get(job.id).attempts] == [1, 2, 3]


@pytest.mark.parametrize("what", ["resume", "retry"])
def test_a_job_that_somebody_else_has_resumed_meanwhile_goes_on_undisturbed(
    what: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit(retries=0)
    service.step()
    service.backend.end(service.name(job), 1)
    service.step()
    real = service.desk.check

    def meanwhile(given: JobSpec, recorded: dict[str, object] | None) -> object:
        monkeypatch.setattr(service.desk, "check", real)
        service.desk.resume(job.id)
        service.step()
        return real(given, recorded)

    monkeypatch.setattr(service.desk, "check", meanwhile)
    with pytest.raises(StateError, match="is running"):
        getattr(service.desk, what)(job.id)
    assert (service.state(job), service.backend.starts.total()) == ("running", 2)


@pytest.mark.parametrize(("number", "is_stopped"), [(2, True), (9, False)])
def test_of_attempts_that_are_not_in_the_record_older_ones_are_stopped_and_later_ones_left_alone(
    service: Service, number: int, is_stopped: bool
) -> None:
    """Only the last ones are kept; what was begun after a backup that was restored is nobody's to stop."""
    job = service.submit()
    service.step()
    attempt = service.desk.get(job.id).attempt
    assert attempt is not None
    service.desk.record.change(job.id, attempts=(replace(attempt, number=5),))
    name = f"lorot-{job.id[:12]}-{number}"
    service.backend.now[name], service.backend.jobs[name] = Status("running"), job.id
    service.restart()
    service.step()
    assert service.backend.cancelled == ([name] if is_stopped else [])


def test_an_attempt_that_the_record_does_not_know_any_more_is_adopted(service: Service) -> None:
    """As after the restore of an older record: the job's own attempt runs, under the name that it would get now."""
    job = service.submit()
    name = f"lorot-{job.id[:12]}-1"
    service.backend.now[name], service.backend.jobs[name] = Status("running"), job.id
    service.restart()
    service.step()
    assert (service.state(job), service.name(job)) == ("running", name)
    assert (service.backend.cancelled, service.backend.starts.total()) == ([], 0)


def killed_at(service: Service, number: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Let the service die after its `number`th word to MLflow or the backend, before it knows the answer."""
    count = [0]
    dead = threading.Event()

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object, **named: object) -> object:
            if dead.is_set():
                raise Killed
            count[0] += 1
            answer = real(*given, **named)
            if count[0] == number:
                dead.set()
                raise Killed
            return answer

        return call

    with monkeypatch.context() as patch:
        patch.setattr(run_creation, "set_tags", dying(run_creation.set_tags))
        patch.setattr(Record, "_settle", dying(Record._settle))
        for name in ("start", "status", "cancel", "remove"):
            patch.setattr(service.backend, name, dying(getattr(service.backend, name)))
        with contextlib.suppress(Killed):
            service.step()
            for running in service.backend.running():
                service.backend.end(running, 1 if running.endswith("-1") else 0)
            service.step()
    return dead.is_set()


def test_killed_at_any_word_the_next_service_starts_each_attempt_once_and_loses_no_job(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 0
    while True:
        number += 1
        job = service.submit(retries=1)
        was_killed = killed_at(service, number, monkeypatch)
        service.restart()
        for _ in range(5):
            for running in service.backend.running():
                service.backend.end(running, 1 if running.endswith("-1") else 0)
            service.step()
        found = service.desk.get(job.id)
        assert (found.state, len(found.attempts)) == ("finished", 2), f"killed at word {number}"
        assert [service.backend.starts[attempt.name] for attempt in found.attempts] == [1, 1], f"word {number}"
        assert Record(service.settings).get(job.id) == found
        assert store.client().get_run(job.id).info.status == "FINISHED"
        if not was_killed:
            break
    assert number > 10, "few moments to die at: does the test still reach them?"


def test_what_runs_for_a_job_that_is_over_is_stopped_and_what_is_nobodys_is_left(service: Service) -> None:
    job = service.submit(retries=0)
    service.step()
    name = service.name(job)
    service.backend.end(name, 1)
    service.step()
    service.backend.now |= {name: Status("running"), "lorot-other-1": Status("running")}
    service.backend.jobs |= {name: job.id, "lorot-other-1": "e" * 32}
    service.restart()
    service.step()
    assert service.backend.cancelled == [name]
    service.backend.end(name, 75)
    service.restart()
    service.step()
    assert service.backend.removed == [name, name]
    assert "lorot-other-1" in service.backend.now


def test_a_job_that_waits_for_an_image_is_starting_and_is_ordered_again_if_that_is_forgotten(service: Service) -> None:
    job = service.submit()
    service.backend.now[f"lorot-{job.id[:12]}-1"] = Status("waiting", reason="fetching the image")
    service.step(2)
    assert service.state(job) == "starting"
    assert store.client().get_run(job.id).info.status == "SCHEDULED"
    del service.backend.now[service.name(job)]
    service.restart()
    service.step()
    assert (service.state(job), service.backend.starts.total()) == ("running", 1)
    assert service.desk.get(job.id).failures == 0


def test_a_job_whose_data_went_outside_meanwhile_fails_with_the_reason(service: Service, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    job = service.submit()
    (tmp_path / "data" / "demo").symlink_to("/etc")
    service.step()
    assert service.state(job) == "failed"
    assert "lies outside" in service.desk.get(job.id).reason
    assert service.backend.starts.total() == 0


def test_the_declared_outputs_of_a_container_are_kept_and_no_link_leads_out(place: str, tmp_path: Path) -> None:
    docker = MemoryBackend("docker")
    service = Service(settings(tmp_path), docker=docker)
    wanted = ("model.bin", "/results/folder", "link.txt", "linked/hosts", "missing", "../attempts", "folder/../../job")
    job, _ = service.desk.submit(JobSpec(kind="container", command=("true",), backend="docker", outputs=wanted))
    service.step()
    outputs = orders.folder_of(service.settings, job.id) / "outputs"
    (outputs / "folder" / "deep").mkdir(parents=True)
    (outputs / "model.bin").write_text("weights")
    (outputs / "folder" / "deep" / "a.txt").write_text("a")
    (outputs / "folder" / "b.txt").symlink_to("/etc/hostname")
    (outputs / "link.txt").symlink_to("/etc/hostname")
    (outputs / "linked").symlink_to("/etc")
    (outputs / "undeclared.txt").write_text("not asked for")
    docker.end(service.name(job))
    service.step()
    assert service.state(job) == "finished"
    kept = orders.Path(store.client().download_artifacts(job.id, ""))
    found = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    assert found == {"outputs/model.bin", "outputs/folder/deep/a.txt"}
    service.controller.stop(0)


def test_what_an_attempt_could_not_send_is_in_the_record_when_it_has_ended(service: Service) -> None:
    job = service.submit()
    service.step()
    run = orders.folder_of(service.settings, job.id) / "run"
    run.mkdir(exist_ok=True)
    late = [{"run_id": job.id}, {"op": "tags", "time_ms": 1, "values": {"late": "1"}}]
    (run / "spool.jsonl").write_text("".join(json.dumps(line) + "\n" for line in late))
    service.backend.end(service.name(job))
    service.step()
    assert service.state(job) == "finished"
    assert store.client().get_run(job.id).data.tags["late"] == "1"


def test_one_service_works_on_a_record_and_another_is_told_which(service: Service) -> None:
    with pytest.raises(TakenError, match=r"another service works on this record \(process \d+ on "):
        Controller(Desk(service.settings, backends=service.backends)).open()


def test_everybody_who_listens_hears_every_change(service: Service) -> None:
    heard: list[tuple[str, str]] = []
    service.controller.on_change.append(lambda job: heard.append((job.id, job.state)))
    job = service.submit()
    service.step()
    service.backend.end(service.name(job))
    service.step()
    assert [state for _, state in heard] == ["queued", "starting", "running", "finished"]


def test_the_thread_moves_jobs_on_by_itself_and_ends_when_it_is_told(place: str, tmp_path: Path) -> None:
    backend = MemoryBackend()
    desk = Desk(settings(tmp_path, poll_s=0.01), backends={"local": backend})
    controller = Controller(desk)
    runs = threading.Event()
    controller.on_change.append(lambda job: runs.set() if job.state == "running" else None)
    controller.start()
    desk.submit(spec())
    assert runs.wait(30)
    controller.stop(60)
    assert controller.last_round_s > 0
    assert not [thread for thread in threading.enumerate() if thread.name == "lorot-jobs"]
