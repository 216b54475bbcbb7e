"""That what is done to one job waits for its own turn only."""

import threading

from service.jobs.turns import Turns


def test_whoever_comes_to_a_job_that_another_is_at_waits_until_that_one_is_done() -> None:
    turns, come, entered = Turns(), threading.Event(), threading.Event()

    def follow() -> None:
        come.set()
        with turns.of("a"):
            entered.set()

    with turns.of("a"):
        thread = threading.Thread(target=follow)
        thread.start()
        assert come.wait(30)
        assert not entered.wait(0.5)
        assert len(turns) == 1
    thread.join(30)
    assert entered.is_set()
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
