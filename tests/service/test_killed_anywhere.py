"""Killed before any of its calls that change files, and by a power cut, what keeps state goes on where it was."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from killing import after_each_kill

from service import bundle, scratch_folder
from service.api.audit import Audit
from service.api.sessions import Sessions
from service.api.tokens import Token, Tokens
from service.jobs import attempt_files, runner
from service.jobs.backends import Status
from service.jobs.backends.local.backend import Local
from service.jobs.job import Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from service.operations import archive, garbage
from service.operations.backup import back_up
from service.operations.garbage import DAY_S, Rules
from service.operations.restore import restore
from service.run_folder import RunFolder
from service.spool import Spool
from service.whole_file import write_json

ROOT = Path(__file__).parents[2]
each_end = pytest.mark.parametrize("power", [False, True], ids=["killed", "power cut"])


def hidden(folder: Path) -> list[str]:
    """What lies there under a name that is nobody's."""
    return sorted(path.name for path in folder.rglob(".*"))


@each_end
def test_a_json_file_is_the_old_one_or_the_new_one(tmp_path: Path, power: bool) -> None:
    seen = set()
    for place in after_each_kill(
        tmp_path,
        lambda place: write_json(place / "kept.json", {"number": 1}),
        lambda place: write_json(place / "kept.json", {"number": 2}),
        power=power,
    ):
        seen.add(json.loads((place / "kept.json").read_text())["number"])
        write_json(place / "kept.json", {"number": 3})
        assert not hidden(place)
    assert seen == {1, 2}


@each_end
def test_tokens_stay_and_can_be_made_and_revoked(tmp_path: Path, power: bool) -> None:
    def work(place: Path) -> None:
        Tokens(place / "tokens.json").create("ben", "submit")
        Tokens(place / "tokens.json").revoke("ann")

    for place in after_each_kill(
        tmp_path, lambda place: Tokens(place / "tokens.json").create("ann", "read"), work, power=power
    ):
        tokens = Tokens(place / "tokens.json")
        assert [one.name for one in tokens.list()] in (["ann"], ["ann", "ben"], ["ben"])
        tokens.create("cleo", "admin")
        tokens.revoke("cleo")


@each_end
def test_browsers_are_let_in_again(tmp_path: Path, power: bool) -> None:
    token = Token("ann", "0" * 64, ("read",), "")

    def work(place: Path) -> None:
        sessions = Sessions(place / "state" / "session.key")
        sessions.close(sessions.open(token))

    for place in after_each_kill(tmp_path, lambda place: None, work, power=power):
        sessions = Sessions(place / "state" / "session.key")
        cookie = sessions.open(token)
        assert sessions.holds(cookie, token)
        assert Sessions(place / "state" / "session.key").holds(cookie, token), "nobody else knows the key"


def test_no_line_of_the_audit_log_is_lost_or_put_into_another(tmp_path: Path) -> None:
    def work(place: Path) -> None:
        audit = Audit(place / "audit.jsonl", 150)
        for number in range(3, 7):
            audit.write(number=number)

    def lines(place: Path) -> list[int]:
        paths = sorted(
            place.glob("audit.jsonl*"), key=lambda path: -int(path.suffix[1:]) if path.suffix[1:].isdigit() else 0
        )
        return [json.loads(line)["number"] for path in paths for line in path.read_text().splitlines()]

    def prepare(place: Path) -> None:
        for number in range(3):
            Audit(place / "audit.jsonl", 150).write(number=number)

    for place in after_each_kill(tmp_path, prepare, work):
        Audit(place / "audit.jsonl", 150).write(number=7)
        found = lines(place)
        assert found == [*range(max(3, len(found) - 1)), 7]


def test_what_a_full_disk_has_cut_short_stays_a_line_of_its_own(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl", 1000)
    audit.write(number=1)
    with audit.path.open("a") as file:
        file.write('{"time": "2026')
    audit.write(number=2)
    assert [line[-2:] for line in audit.path.read_text().splitlines()] == ["1}", "26", "2}"]


def test_a_spool_passes_over_nothing_of_the_next_run_and_sends_nothing_of_the_last_again(tmp_path: Path) -> None:
    def opened(place: Path, run: str) -> Spool:
        return Spool(place / "spool.jsonl", {"run_id": run})

    def fill(spool: Spool) -> None:
        for number in range(8):
            spool.append({"number": number})

    def prepare(place: Path) -> None:
        first = opened(place, "first")
        fill(first)
        first.acknowledge(first.read()[-1][1])
        first.close()

    def work(place: Path) -> None:
        first = opened(place, "first")
        first.discard()
        first.close()
        second = opened(place, "second")
        fill(second)
        second.acknowledge(second.read()[2][1])

    for place in after_each_kill(tmp_path, prepare, work):
        spool = opened(place, "second")
        if spool.header() == {"run_id": "first"}:
            assert spool.empty(), "it would be sent again"
            continue
        waiting = [record["number"] for record, _ in spool.read()]
        assert waiting in ([3, 4, 5, 6, 7], list(range(len(waiting))))
        fill(spool)
        spool.close()
        assert opened(place, "second").waiting() == len(waiting) + 8


@each_end
def test_a_run_folder_says_what_it_said_or_what_it_says_now(tmp_path: Path, power: bool) -> None:
    def prepare(place: Path) -> None:
        folder = RunFolder(place)
        folder.write("run.json", {"number": 1})
        for step in (1, 2, 3):
            folder.append_metrics({"loss": 1.0}, step)

    def work(place: Path) -> None:
        RunFolder(place).forget_after(2)
        RunFolder(place).write("run.json", {"number": 2})
        RunFolder(place).write("summary.json", {"number": 2})

    for place in after_each_kill(tmp_path, prepare, work, power=power):
        folder = RunFolder(place)
        assert folder.read("run.json") in ({"number": 1}, {"number": 2})
        assert not folder.summary.exists() or folder.read("summary.json") == {"number": 2}
        assert len(folder.metrics.read_text().splitlines()) in (2, 3)


@each_end
def test_an_attempt_s_end_is_there_whole_or_not_at_all(tmp_path: Path, power: bool) -> None:
    ended = Status("ended", 3, reason="because", ended_s=1.0)
    for place in after_each_kill(
        tmp_path, lambda place: None, lambda place: attempt_files.note(place, 1, ended), power=power
    ):
        assert attempt_files.noted(place, 1) in (None, ended)
        attempt_files.note(place, 1, ended)
        assert attempt_files.noted(place, 1) == ended
        assert not hidden(place)


def test_a_command_runs_once_however_its_runner_dies(tmp_path: Path) -> None:
    def prepare(place: Path) -> None:
        command = ["/bin/sh", "-c", f"echo ran >> {place / 'ran'}"]
        write_json(place / runner.ORDER, {"name": place.name, "command": command, "environment": {}, "grace_s": 1})

    local = Local(ServiceSettings(results=tmp_path / "jobs", state=tmp_path / "state"))
    states = set()
    for place in after_each_kill(tmp_path, prepare, runner.run):
        while (status := local.status(place.name, {"folder": str(place)})).phase == "running":
            time.sleep(0.01)
        before = (place / runner.BEGUN).exists()
        states.add((before, status.phase))
        assert status.phase == "gone" or status.exit_code == 0
        # As a process of its own: it blocks signals, which all that is started here afterwards would inherit.
        subprocess.run([sys.executable, "-m", "service.jobs.runner", str(place)], cwd=ROOT, check=True)
        assert (place / "ran").exists() or before
        assert not (place / "ran").exists() or (place / "ran").read_text() == "ran\n"
    assert states == {(False, "gone"), (True, "gone"), (True, "ended")}


@each_end
def test_a_model_is_written_over_a_half_written_one_and_nothing_is_left(tmp_path: Path, power: bool) -> None:
    def write(place: Path, content: bytes) -> None:
        bundle.write_folder(place / "model", {"a": content, "b": content})

    for place in after_each_kill(tmp_path, partial(write, content=b"1"), partial(write, content=b"2"), power=power):
        found = {path.name: path.read_bytes() for path in place.glob("model/*")}
        assert found in ({}, {"a": b"1", "b": b"1"}, {"a": b"2", "b": b"2"})
        write(place, b"3")
        assert sorted(path.name for path in place.rglob("*")) == ["a", "b", "model"]


def test_a_folder_in_the_making_is_left_alone_while_its_process_lives(tmp_path: Path) -> None:
    left = tmp_path / ".making-abcdefgh.making"
    left.mkdir()
    # Somebody's own, and no folder.
    (tmp_path / ".making-of").mkdir()
    (tmp_path / ".making-a_file_1.making").touch()
    with scratch_folder.made(tmp_path, ".making-") as first:
        assert not left.exists()
        with scratch_folder.made(tmp_path, ".making-") as second:
            assert first.is_dir()
            assert second.is_dir()
    assert hidden(tmp_path) == [".making-a_file_1.making", ".making-of"]


def test_what_is_written_whole_keeps_its_name_after_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Path]] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: seen.append(("synced", Path(f"/proc/self/fd/{descriptor}").readlink()))
    )
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda *places, **named: (replace(*places, **named), seen.append(("named", Path())))
    )
    for write in (
        lambda: write_json(tmp_path / "a.json", {}),
        lambda: attempt_files.note(tmp_path, 1, Status("ended")),
    ):
        seen.clear()
        write()
        assert [what for what, _ in seen] == ["synced", "named", "synced"]
        assert seen[-1][1].is_dir(), "a file's name is its folder's"


@pytest.fixture
def settings(place: str, tmp_path: Path) -> ServiceSettings:
    """Of a service with a record, a token and a job's log."""
    made = ServiceSettings(results=tmp_path / "jobs", state=tmp_path / "state")
    Tokens(made.state / "tokens.json").create("ann", "submit")
    log = made.results / ("a" * 32) / "attempts" / "1" / "log-node0.txt"
    log.parent.mkdir(parents=True)
    log.write_text("line\n")
    return made


def test_a_backup_is_there_whole_or_not_at_all_and_the_next_one_leaves_nothing_of_it(
    settings: ServiceSettings, tmp_path: Path
) -> None:
    def work(place: Path) -> None:
        back_up(settings, place / "b.tar", with_jobs=True)

    for place in after_each_kill(tmp_path / "killed", lambda place: None, work):
        if (place / "b.tar").exists():
            with archive.reading(place / "b.tar") as reader:
                reader.verify()
        else:
            # In a container the next one may have the same number.
            work(place)
            assert [path.name for path in place.iterdir()] == ["b.tar"]


def test_a_restored_service_is_there_whole_or_not_at_all_and_the_next_one_leaves_nothing_of_it(
    settings: ServiceSettings, tmp_path: Path
) -> None:
    source = back_up(settings, tmp_path / "b.tar", with_jobs=True)

    def work(place: Path) -> None:
        restore(source, place / "new")

    def files(place: Path) -> set[str]:
        return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}

    work(tmp_path / "whole")
    for place in after_each_kill(tmp_path / "killed", lambda place: None, work):
        if not (place / "new").exists():
            work(place)
        assert files(place) >= files(tmp_path / "whole")


def test_gc_removes_the_same_after_a_gc_that_was_killed(tmp_path: Path) -> None:
    now_s, rules = time.time(), Rules(log_bytes=200)
    known, strange = "a" * 32, "b" * 32
    job = Job(known, "1", JobSpec(), "finished", ended_s=now_s - 40 * DAY_S)
    checkpoints = [f"{known}/run/checkpoints/{name}/weights" for name in ("step-00000001", ".step-00000002.writing")]

    def prepare(place: Path) -> None:
        for name in (*checkpoints, f"{strange}/run/metrics.jsonl", f"{known}/run/metrics.jsonl"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text("text\n")
        log = place / known / "attempts" / "1" / "log-node0.txt"
        log.parent.mkdir(parents=True)
        log.write_text("".join(f"line {number}\n" for number in range(100)))
        for path in (place, *place.rglob("*")):
            os.utime(path, (now_s - 40 * DAY_S,) * 2)

    def work(place: Path, later_s: float = 0.0) -> None:
        settings = ServiceSettings(results=place, state=place / "state")
        found = garbage.find(settings, [job], rules, lambda name: True, now_s + later_s)
        assert garbage.remove(found, lambda name: True, rules) == []

    for place in after_each_kill(tmp_path / "killed", prepare, work):
        log = place / known / "attempts" / "1" / "log-node0.txt"
        assert log.read_text().endswith("line 99\n")
        # A folder that was on its way out is touched by that.
        work(place, 40 * DAY_S)
        assert log.stat().st_size <= 200
        kept = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
        assert kept == {f"{known}/run/metrics.jsonl", f"{known}/attempts/1/log-node0.txt"}
