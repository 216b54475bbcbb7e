"""What the end of an attempt means: a table of exit codes, and what changes it."""

from dataclasses import replace

import pytest

from service.jobs import verdict
from service.jobs.backends import Status
from service.jobs.job import Attempt, Job
from service.jobs.spec import JobSpec

JOB = Job("f" * 32, "1", JobSpec(retries=2), "running", attempts=(Attempt(1, "lorot-ffffffffffff-1"),))
CONTAINER = replace(JOB, spec=JobSpec(kind="container", command=("true",), backend="docker", retries=2))


@pytest.mark.parametrize(
    ("code", "state", "failures"),
    [
        (0, "finished", 0),
        (75, "queued", 0),
        (-15, "queued", 0),
        (143, "queued", 0),
        (130, "killed", 0),
        (2, "failed", 1),
        (3, "failed", 1),
        (4, "failed", 1),
        (5, "failed", 1),
        (1, "queued", 1),
        (6, "queued", 1),
        (7, "queued", 1),
        (8, "queued", 1),
        (-9, "queued", 1),
        (137, "queued", 1),
        (None, "queued", 1),
    ],
)
def test_each_exit_code_of_a_training_has_its_consequence(code: int | None, state: str, failures: int) -> None:
    found = verdict.judge(JOB, Status("ended", exit_code=code))
    assert (found.state, found.failures) == (state, failures)
    assert bool(found.reason) == (code != 0)


def test_failures_are_retried_as_often_as_the_spec_says_and_no_oftener() -> None:
    states = [verdict.judge(replace(JOB, failures=before), Status("ended", exit_code=1)).state for before in range(4)]
    assert states == ["queued", "queued", "failed", "failed"]


def test_a_cancelled_job_is_killed_whatever_its_exit_code_but_one_that_finished_has_finished() -> None:
    cancelled = replace(JOB, cancel=True, state="stopping")
    for code in (75, 1, 2, -9, 137, None):
        assert verdict.judge(cancelled, Status("ended", exit_code=code)).state == "killed"
    assert verdict.judge(cancelled, Status("gone")).state == "killed"
    assert verdict.judge(cancelled, Status("ended", exit_code=0)).state == "finished"


def test_what_was_preempted_does_not_count() -> None:
    found = verdict.judge(replace(JOB, failures=2), Status("ended", exit_code=137, preempted=True))
    assert (found.state, found.failures) == ("queued", 2)


def test_a_containers_exit_codes_are_its_own() -> None:
    assert verdict.judge(CONTAINER, Status("ended", exit_code=2)).state == "queued"
    assert verdict.judge(CONTAINER, Status("ended", exit_code=75)).failures == 1
    assert "input" not in verdict.judge(CONTAINER, Status("ended", exit_code=2)).reason


def test_another_attempt_goes_on_from_the_last_checkpoint() -> None:
    assert verdict.judge(JOB, Status("gone")).fields()["resume"] is True
    assert "resume" not in verdict.judge(JOB, Status("ended", exit_code=2)).fields()


def test_the_reason_says_what_is_known_best() -> None:
    assert "memory" in verdict.judge(JOB, Status("ended", exit_code=-9, out_of_memory=True)).reason
    assert verdict.judge(JOB, Status("ended", exit_code=1), "the loss is a fish").reason == "the loss is a fish"
    assert "signal 11" in verdict.judge(JOB, Status("ended", exit_code=-11)).reason
    assert "bad data" in verdict.judge(JOB, Status("ended", exit_code=3)).reason
