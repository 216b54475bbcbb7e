"""What a worker does that hears nothing of another while they start, or open what comes next."""

import re
from pathlib import Path

import pytest

from service.run_folder import RunFolder
from tests.service.watched_worker import NO_TIMER, ended

# Two workers that start, of which the other one is a file; a look takes 0.1 s of the real clock and 0.2 s of its own.
START = """
dog = Watchdog(RunFolder(folder), World(0, 2, 0, 2, torch.device("cpu")), timeout_s)

def other(count):
    told = {"attempt": dog._attempt, "rank": 1, "count": count, "step": 0, "phase": "starting", "idle_s": 0.0}
    RunFolder(folder / "workers").write("rank1.json", told | {"place": "nowhere"})

def pass_looks():
    now[0] += 100
    looked()
"""


def test_a_start_takes_as_long_as_it_takes_while_the_others_give_signs_and_ends_when_one_falls_silent(
    tmp_path: Path,
) -> None:
    body = """
with dog:
    for number in range(1, 31):
        other(number)
        pass_looks()
    print("left alone", flush=True)
    for _ in range(100):
        pass_looks()
"""
    worker = ended(tmp_path, 1, NO_TIMER + START + body)
    assert (worker.returncode, worker.stdout) == (8, "left alone\n"), worker.stderr
    told = RunFolder(tmp_path).read("error.json")["message"]
    assert told.startswith("worker 0, after step 0: worker 1 stopped answering within timeout_s=1")
    assert "worker 1: step 0, starting for 0 s, at nowhere" in told


def test_a_worker_that_never_gives_a_sign_ends_a_start(tmp_path: Path) -> None:
    body = """
with dog:
    for _ in range(100):
        pass_looks()
"""
    worker = ended(tmp_path, 1, NO_TIMER + START + body)
    assert worker.returncode == 8, worker.stderr
    assert "worker 1: never gave a sign" in RunFolder(tmp_path).read("error.json")["message"]


# The same two, who wait for the first batch of a loader: the main thread passes the looks meanwhile.
OPENING = """
import contextlib
from service.training import distributed
distributed.however_long = lambda world, what: contextlib.nullcontext()

def wait(seconds, looks, number=0):
    for _ in range(looks):
        if number:
            other(number)
            number += 1
        now[0] += seconds
        looked()
"""


def test_a_worker_that_falls_silent_in_an_opening_is_noticed_long_before_the_ten_minutes_of_those_that_live(
    tmp_path: Path,
) -> None:
    body = """
def batches():
    wait(10, 50, number=1)  # The first may take its time.
    print("left alone", flush=True)
    wait(0.2, 100)
    yield 1

with dog:
    for _ in dog.through(batches(), "waiting for a batch", "training"):
        print("never noticed")
"""
    worker = ended(tmp_path, 1, NO_TIMER + START + OPENING + body)
    assert (worker.returncode, worker.stdout) == (8, "left alone\n"), worker.stderr
    told = RunFolder(tmp_path).read("error.json")["message"]
    assert told.startswith("worker 0, after step 0: worker 1 stopped answering within timeout_s=1")
    assert "worker 0: step 0, waiting for a batch, the first for 5" in told
    assert "worker 1: step 0, starting for 0 s, at nowhere" in told
    assert "in batches" in worker.stderr


def test_workers_that_live_have_ten_minutes_for_an_opening_and_no_more(tmp_path: Path) -> None:
    body = """
with dog, dog.together("scoring"):
    wait(10, 59, number=1)
    print("left alone", flush=True)
    for number in range(100, 4000):
        other(number)
        now[0] += 0.02
        time.sleep(0.02)
"""
    worker = ended(tmp_path, 1, NO_TIMER + START + OPENING + body)
    assert (worker.returncode, worker.stdout) == (8, "left alone\n"), worker.stderr
    assert re.search(r"worker 0: step 0, scoring for 6\d\d s", RunFolder(tmp_path).read("error.json")["message"])


def test_silence_counts_from_the_beginning_of_an_opening(tmp_path: Path) -> None:
    """Between two of them, the operations of all workers fail by themselves, and nobody looks for signs."""
    body = """
with dog:
    with dog.together("opening"):
        other(1)
        wait(0.2, 4)
    for _ in range(20):
        dog.note("training")
        wait(0.2, 1)
    with dog.together("opening again"):
        wait(0.2, 4)
print("left alone")
"""
    worker = ended(tmp_path, 1, NO_TIMER + START + OPENING + body)
    assert (worker.returncode, worker.stdout) == (0, "left alone\n"), worker.stderr


def test_a_machine_that_stood_still_takes_nobody_for_silent_in_an_opening(tmp_path: Path) -> None:
    body = """
with dog, dog.together("opening"):
    other(1)
    wait(0.2, 1)
    wait(100, 3)
    other(2)
    looked()
print("left alone")
"""
    worker = ended(tmp_path, 1, NO_TIMER + START + OPENING + body)
    assert (worker.returncode, worker.stdout) == (0, "left alone\n"), worker.stderr


@pytest.mark.parametrize("phase", ["contextlib.nullcontext()", "dog.together('opening')"])
def test_nobody_is_taken_for_silent_while_signs_cannot_be_written(phase: str, tmp_path: Path) -> None:
    body = (
        f"""
phase = {phase}
"""
        + """
# A write to it fails, as to a full disk; how often shows in `looks`.
(folder / "workers" / "rank0.json").mkdir(parents=True)
looks, leave = [], dog._leave_sign
dog._leave_sign = lambda idle_s: looks.append(idle_s) or leave(idle_s)
with dog, phase:
    for number in range(1, 21):
        now[0] += 0.2
        while len(looks) < number:
            time.sleep(0.01)
print("left alone")
"""
    )
    worker = ended(tmp_path, 1, NO_TIMER + START + OPENING + body)
    assert (worker.returncode, worker.stdout) == (0, "left alone\n"), worker.stderr


def test_two_that_look_who_is_silent_at_the_same_time_hear_each_other(tmp_path: Path) -> None:
    """Each leaves signs while it looks, with the place where it was before."""
    body = """
sign = RunFolder(folder / "workers")
with dog:
    looked()
    dog._every_s = 0.02
    dog._over.set()
    dog._thread.join()
    before = sign.read("rank0.json")
    found = dog._signs_twice()
    print([one.rank for one in found], found[0].place == before["place"], found[0].count > before["count"])
"""
    worker = ended(tmp_path, 1, NO_TIMER + START + body)
    assert (worker.returncode, worker.stdout) == (0, "[0] True True\n"), worker.stderr
