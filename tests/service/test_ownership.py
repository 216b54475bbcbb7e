"""One job at a time writes to a run's folder: on this machine by a lock, between machines by a sign of life."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from service import ownership
from service.errors import ConfigError, StorageError, SucceededError, TakenError
from service.ownership import Ownership

HOLDS = """
import sys, time
from pathlib import Path
from service import ownership
from service.ownership import Ownership
ownership.BEAT_S = 0.05
Ownership(Path(sys.argv[1]), *sys.argv[2:]).take()
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "WATCH_S", 1.5)
    monkeypatch.setattr(ownership, "BEAT_S", 0.3)


def holder(folder: Path, *machine: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", HOLDS, str(folder), *machine]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = holder(tmp_path)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For takes that end as soon as something happens: on a busy machine that may be late."""
    monkeypatch.setattr(ownership, "WATCH_S", 60.0)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a shared disk without them."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_that_nobody_has_a_folder_says_something_only_of_one_that_was_taken(tmp_path: Path) -> None:
    assert not ownership.refuse_if_owned(tmp_path)
    mine = Ownership(tmp_path)
    mine.take()
    mine.release()
    assert ownership.refuse_if_owned(tmp_path)


def test_a_living_owner_is_named_and_a_killed_one_is_succeeded_without_watching_it(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TakenError, match=f"another job runs there \\(process {other.pid} on .*name=OTHER"):
        Ownership(tmp_path).take()
    with pytest.raises(ConfigError):
        ownership.refuse_if_owned(tmp_path)
    other.kill()
    other.wait()
    mine = Ownership(tmp_path)
    # Whoever waits for a lock, or for a sign of life, sleeps between two looks.
    naps: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(ownership, "time", SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=naps.append))
        mine.take()
    assert naps == []
    mine.check()
    mine.release()
    ownership.refuse_if_owned(tmp_path)


def test_a_stopped_owner_of_this_machine_still_has_it(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError):
        Ownership(tmp_path).take()


@pytest.mark.usefixtures("patient")
def test_a_dying_owner_is_waited_for(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    threading.Timer(0.5, other.kill).start()
    mine = Ownership(tmp_path)
    mine.take()
    mine.release()


@pytest.mark.usefixtures("no_locks", "patient")
def test_without_locks_a_growing_number_is_a_sign_of_life(tmp_path: Path) -> None:
    first = Ownership(tmp_path, "one")
    first.take()
    with pytest.raises(ConfigError, match="another job runs there"):
        Ownership(tmp_path, "two").take()
    with pytest.raises(ConfigError, match="another job runs there"):
        Ownership(tmp_path, "one").take()
    first.check()
    first.release()
    second = Ownership(tmp_path, "two")
    second.take()
    second.release()


@pytest.mark.usefixtures("patient")
def test_an_owner_of_another_machine_is_watched_even_where_the_lock_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Ownership(tmp_path, "elsewhere")
    with monkeypatch.context() as patch:
        # Its lock is known to its own machine only.
        patch.setattr(fcntl, "flock", lambda descriptor, operation: None)
        elsewhere.take()
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        Ownership(tmp_path, "here").take()
    elsewhere.release()


@pytest.mark.usefixtures("no_locks")
def test_an_owner_that_seemed_dead_finds_that_it_was_succeeded(tmp_path: Path) -> None:
    first = Ownership(tmp_path, "one")
    first.take()
    with first._writing:
        first._ended.set()  # it stands still
    second = Ownership(tmp_path, "two")
    second.take()
    with pytest.raises(SucceededError, match="taken this run over while this worker stood still"):
        first.check()
    second.check()
    first.release()
    second.check()
    assert json.loads((tmp_path / "owner.json").read_text())["machine"] == "two"
    second.release()
    assert not (tmp_path / "owner.json").exists()


@pytest.mark.usefixtures("no_locks")
def test_an_owner_notes_at_a_sign_of_life_that_it_was_succeeded_and_does_not_forget_it(tmp_path: Path) -> None:
    first, second = Ownership(tmp_path, "one"), Ownership(tmp_path, "two")
    first.take()
    assert not first.lost
    succeed(first, second)
    # As it leaves the folder at its end.
    (tmp_path / "owner.json").unlink()
    with pytest.raises(StorageError, match=f"process {os.getpid()} on .* has taken this run over"):
        first.check()
    first.release()
    assert not second.lost


@pytest.mark.usefixtures("no_locks")
def test_an_owner_that_wakes_up_does_not_take_its_place_back(tmp_path: Path) -> None:
    first, second = Ownership(tmp_path, "one"), Ownership(tmp_path, "two")
    first.take()
    succeed(first, second)
    time.sleep(3 * ownership.BEAT_S)
    second.check()
    first.release()
    second.check()


@pytest.mark.usefixtures("no_locks")
def test_what_an_owner_was_about_to_write_is_not_written_after_its_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = Ownership(tmp_path, "one")
    begun, go_on = threading.Event(), threading.Event()
    beat = Ownership._beat

    def late(self: Ownership) -> None:
        if threading.current_thread().name == "owner":
            begun.set()
            go_on.wait(120)
        beat(self)

    monkeypatch.setattr(Ownership, "_beat", late)
    owner.take()
    assert begun.wait(120)
    beating = [thread for thread in threading.enumerate() if thread.name == "owner"]
    threading.Timer(0.2, go_on.set).start()
    owner.release()
    assert not (tmp_path / "owner.json").exists()
    go_on.set()
    for thread in beating:
        thread.join()
    assert not (tmp_path / "owner.json").exists()


def succeed(first: Ownership, second: Ownership) -> None:
    """Let `second` write while `first` is not about to, and `first` find it at its next sign of life."""
    with first._writing:
        second._beat()
    deadline = time.monotonic() + 120
    while not first.lost and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.lost


def watch(patch: pytest.MonkeyPatch, folder: Path, is_alive: Callable[[], bool]) -> None:
    """Give whoever watches an owner a clock by which a living one is never late: a nap lasts until its next beat."""
    now = 0.0

    def nap(seconds: float) -> None:
        nonlocal now
        now += seconds
        sign = folder / ownership.OWNER
        before, deadline = ownership.read(sign).get("beat"), time.monotonic() + 120
        while is_alive() and ownership.read(sign).get("beat") == before and time.monotonic() < deadline:
            time.sleep(0.01)

    patch.setattr(ownership, "time", SimpleNamespace(monotonic=lambda: now, time=time.time, sleep=nap))


def test_a_lock_that_is_kept_for_a_machine_without_power_does_not_hold_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    is_alive = True
    watch(monkeypatch, tmp_path, lambda: is_alive)
    lost = holder(tmp_path, "elsewhere")
    try:
        with pytest.raises(TakenError, match=f"process {lost.pid}"):
            Ownership(tmp_path, "here").take()
        # Its lock stays, its beat does not.
        lost.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, lost.pid, os.WSTOPPED | os.WNOWAIT)
        is_alive = False
        mine = Ownership(tmp_path, "here")
        mine.take()
        is_alive = True
        assert not mine.lost
        # Without the lock, it is watched like an owner of another machine, by its own machine's others too.
        with pytest.raises(TakenError, match=f"process {os.getpid()}"):
            Ownership(tmp_path, "here").take()
        lost.kill()
        lost.wait()
        with pytest.raises(TakenError, match=f"process {os.getpid()}"):
            Ownership(tmp_path, "here").take()
        mine.check()
        mine.release()
    finally:
        lost.kill()
        lost.communicate()


def test_a_folder_that_cannot_be_written_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        Ownership(tmp_path / "missing").take()


def test_a_folder_that_nobody_ever_had_is_free_and_stays_as_it_is(tmp_path: Path) -> None:
    ownership.refuse_if_owned(tmp_path)
    assert list(tmp_path.iterdir()) == []
