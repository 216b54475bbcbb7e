"""Whether the process that works on a run is still there."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service import holder
from service.holder import Holder


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def test_a_process_is_alive_until_it_is_killed() -> None:
    child = sleeper()
    try:
        known = Holder.of(child.pid)
        assert known.is_alive() is True
    finally:
        child.kill()
        child.wait()
    assert known.is_alive() is False


def test_a_dead_process_that_nobody_has_looked_after_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = Holder.of(process.pid)
    process.kill()
    # Until its parent asks for its end it stays in the table of processes.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert known.is_alive() is False
    process.wait()


def test_another_process_under_the_same_number_is_not_taken_for_it() -> None:
    known = Holder.of(os.getpid())
    assert dataclasses.replace(known, started_s=known.started_s - 60).is_alive() is False


def test_a_machine_that_was_started_anew_has_none_of_its_old_processes() -> None:
    before = dataclasses.replace(Holder.of(os.getpid()), boot="another start")
    assert before.is_alive() is False
    assert not before.shares_kernel()


def test_of_another_machine_or_container_nothing_is_known() -> None:
    known = Holder.of(os.getpid())
    assert dataclasses.replace(known, host="elsewhere", boot="another").is_alive() is None
    inside = dataclasses.replace(known, namespace="pid:[1]")
    assert inside.is_alive() is None
    assert inside.shares_kernel()


def test_it_survives_json_and_its_label_tells_any_two_apart() -> None:
    known = Holder.of(os.getpid())
    assert Holder.read(json.loads(json.dumps(known.content()))) == known
    others = [dataclasses.replace(known, **{name: "other"}) for name in ("host", "boot", "namespace")]
    others += [dataclasses.replace(known, pid=1), dataclasses.replace(known, started_s=1.0)]
    assert len({one.label() for one in [known, *others]}) == 6


@pytest.mark.parametrize("content", [None, [], "text", {}, {"host": "a", "boot": "b", "namespace": "", "pid": "x"}])
def test_what_is_no_holder_is_none(content: object) -> None:
    assert Holder.read(content) is None


def test_a_worker_of_torchrun_is_answered_for_by_its_agent_and_any_other_process_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert Holder.here().pid == os.getpid()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert Holder.here().pid == os.getppid()


def test_a_folder_is_launched_as_long_as_any_launchers_lock_is_held(tmp_path: Path) -> None:
    assert not holder.is_launched(tmp_path)
    for name in ("launcher.lock", "launcher-10.0.0.1.lock"):
        with (tmp_path / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert holder.is_launched(tmp_path)
        assert not holder.is_launched(tmp_path)
