"""That what is done to one job waits for its own turn only."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from service.jobs.turns import Turns


def test_two_are_at_one_job_one_after_the_other() -> None:
    turns, seen = Turns(), {"a": 0, "b": 0}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def count(name: str) -> None:
        for _ in range(300):
            with turns.of(name):
                was = seen[name]
                threading.Event().wait(0)
                seen[name] = was + 1

    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(count, ["a", "b", "a", "b", "a", "b"]))
    finally:
        sys.setswitchinterval(interval)
    assert seen == {"a": 900, "b": 900}
    assert len(turns) == 0


def test_whoever_is_at_one_of_a_thousand_jobs_keeps_nobody_from_the_others() -> None:
    turns, done = Turns(), threading.Event()

    def pass_through() -> None:
        for number in range(1, 1000):
            with turns.of(str(number)):
                pass
        done.set()

    with turns.of("0"):
        threading.Thread(target=pass_through, daemon=True).start()
        assert done.wait(30)
        assert len(turns) == 1
    assert len(turns) == 0


def test_a_turn_ends_with_an_error_too() -> None:
    turns = Turns()
    try:
        with turns.of("a"):
            raise KeyError
    except KeyError:
        pass
    with turns.of("a"):
        assert len(turns) == 1
