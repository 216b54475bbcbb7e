"""What the record keeps of an attempt that has ended, whose own word is not taken for everything."""

import json
import os
from pathlib import Path

import pytest

from service import store
from service.errors import TrackingError
from service.jobs import keeping
from service.jobs.job import Attempt, Job
from service.jobs.keeping import BusyError
from tests.service.job_specs import settings, spec

NAME = "lorot-ffffffffffff-1"


def run_folder(job: Job, tmp_path: Path) -> Path:
    folder = settings(tmp_path).results / job.id / "run"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_what_an_earlier_attempt_has_said_of_its_end_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    job = Job("f" * 32, "1", spec(), "running", attempts=(Attempt(2, NAME, started_s=1000.0),))
    path = run_folder(job, tmp_path) / "error.json"
    path.write_text(json.dumps({"type": "DataError", "message": "a shard is gone\nin full", "exit_code": 3}))
    assert job.attempt is not None
    for written_s, said in ((900.0, ""), (1010.0, "a shard is gone")):
        os.utime(path, (written_s, written_s))
        assert keeping.said(job, job.attempt, settings(tmp_path)) == said


@pytest.mark.parametrize(
    ("kind", "started_s", "written_s", "content", "is_done"),
    [
        ("train", 1000.0, 1010.0, '{"time_ns": 1}', True),
        ("train", 1000.0, 900.0, '{"time_ns": 1}', False),
        ("train", 0.0, 1010.0, '{"time_ns": 1}', False),
        ("train", 1000.0, 1010.0, "[1]", False),
        ("train", 1000.0, 1010.0, "{", False),
        ("container", 1000.0, 1010.0, '{"time_ns": 1}', False),
    ],
)
def test_that_all_is_done_is_taken_from_the_attempts_own_workers_alone(
    kind: str, started_s: float, written_s: float, content: str, is_done: bool, tmp_path: Path
) -> None:
    own = spec() if kind == "train" else spec(kind="container", backend="docker", command=["true"], config={})
    attempt = Attempt(2, NAME, started_s=started_s)
    job = Job("f" * 32, "1", own, "running", attempts=(attempt,))
    path = run_folder(job, tmp_path) / "end.json"
    path.write_text(content)
    os.utime(path, (written_s, written_s))
    assert keeping.is_done(job, attempt, settings(tmp_path)) == is_done


def test_a_job_speaks_for_no_run_but_its_own(place: str, tmp_path: Path) -> None:
    api = store.client(place)
    own, other = (str(api.create_run("0").info.run_id) for _ in range(2))
    job = Job(own, "0", spec(), "running")
    lines = [{"run_id": other, "uri": place}, {"op": "tags", "time_ms": 1, "values": {"mine": "1"}}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_folder(job, tmp_path) / "spool.jsonl").write_text(text)
    keeping.send_records(job, settings(tmp_path), place)
    assert "mine" not in api.get_run(other).data.tags
    (run_folder(job, tmp_path) / "spool.jsonl").write_text(text.replace(other, own))
    keeping.send_records(job, settings(tmp_path), place)
    assert api.get_run(own).data.tags["mine"] == "1"


@pytest.mark.parametrize("is_away", [False, True])
def test_records_that_cannot_be_sent_now_are_for_later_and_a_server_that_is_away_is_said_to_be(
    is_away: bool, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = str(store.client(place).create_run("0").info.run_id)
    job = Job(run_id, "0", spec(), "running")
    folder = run_folder(job, tmp_path)
    spool = [{"run_id": run_id}, {"op": "tags", "time_ms": 1, "values": {"mine": "1"}}]
    (folder / "spool.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spool))

    def away(*_: object) -> None:
        raise store.UnreachableError("nobody there") if is_away else TrackingError("the records are refused")

    monkeypatch.setattr(keeping.recovery, "sync_foreign", away)
    with pytest.raises(store.UnreachableError if is_away else BusyError):
        keeping.send_records(job, settings(tmp_path), place)
