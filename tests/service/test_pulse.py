"""Machines that vanish without a word: the others hear of it, over a real store."""

import queue
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from service.errors import ConfigError
from service.training import pulse
from service.training.pulse import Pulse

SILENCE_S = 2.0


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> "queue.Queue[str]":
    monkeypatch.setattr(pulse, "_EVERY_S", 0.05)
    return queue.Queue()


def of(store: TCPStore, machine: int, count: int, told: "queue.Queue[str]") -> Pulse:
    made = Pulse(f"127.0.0.1:{store.port}", "first", machine, count, told.put, SILENCE_S)
    made.start()
    return made


def begun(store: TCPStore, *machines: int) -> None:
    store.wait([f"lorot/pulse/first/{number}" for number in machines])


def test_machines_that_live_or_have_said_that_they_end_are_no_cause_for_alarm(store, told):
    pulses = [of(store, number, 3, told) for number in range(3)]
    begun(store, 0, 1, 2)
    pulses[1].stop()
    with pytest.raises(queue.Empty):
        told.get(timeout=2 * SILENCE_S)
    for one in pulses:
        one.stop()


def test_a_machine_that_falls_silent_is_named_once_by_the_others(store, told):
    began = time.monotonic()
    survivor = of(store, 0, 3, told)
    # It said something once, and was gone: nothing tells it from one that lost its power.
    store.set("lorot/pulse/first/2", "1")
    begun(store, 0)
    assert told.get(timeout=30) == f"machine 2 of the job has given no sign of life for {SILENCE_S:g} s"
    assert time.monotonic() - began > SILENCE_S / 2
    survivor.stop()
    assert told.empty()


def test_a_machine_of_an_earlier_attempt_is_nobodys_concern(store, told):
    store.set("lorot/pulse/earlier/1", "1")
    survivor = of(store, 0, 2, told)
    with pytest.raises(queue.Empty):
        told.get(timeout=2 * SILENCE_S)
    survivor.stop()


def test_a_store_that_cannot_be_reached_any_more_is_named(told, monkeypatch):
    monkeypatch.setattr(pulse, "_LAST_WORD_S", 0.1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = f"127.0.0.1:{store.port}"
    survivor = of(store, 0, 2, told)
    begun(store, 0)
    del store
    assert told.get(timeout=30) == f"the rendezvous at {where} has not answered for {SILENCE_S:g} s"
    survivor.stop()


def test_a_rendezvous_that_was_started_again_in_time_is_no_cause_for_alarm(told):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    survivor = of(store, 0, 2, told)
    begun(store, 0)
    del store
    again = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    # Later than any alarm about the first one.
    again.wait(["lorot/pulse/first/0"], timedelta(seconds=30))
    with pytest.raises(queue.Empty):
        told.get(timeout=2 * SILENCE_S)
    survivor.stop()


def test_a_machine_that_ends_while_the_store_is_slow_still_says_so(store, told, monkeypatch):
    def fails(self, store, told):
        raise RuntimeError("slow")

    monkeypatch.setattr(Pulse, "_look", fails)
    # However busy the machine is: what counts is that it waits for the word, not for how long.
    monkeypatch.setattr(pulse, "_LAST_WORD_S", 60.0)
    ending = Pulse(f"127.0.0.1:{store.port}", "first", 0, 2, told.put, 60.0)
    ending.start()
    begun(store, 0)
    ending.stop()
    assert store.get("lorot/pulse/first/0") == b"over"


class Laps:
    """A clock that goes on only while the judging thread waits, by as many seconds as its next lap takes."""

    def __init__(self, monkeypatch):
        self.now, self._left = 1000.0, []
        monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: self.now))

    def judge(self, one, *laps_s):
        self._left = [*laps_s]
        one._judge()

    def wait(self, timeout_s):
        if not self._left:
            return True
        self.now += self._left.pop(0)
        return False

    def is_set(self):
        return False


class Words:
    """A store that answers at once, with what machines 0 and 1 have said."""

    def __init__(self, *said):
        self.said = said

    def check(self, keys):
        return True

    def multi_get(self, keys):
        return [word.encode() for word in self.said]


@pytest.fixture
def laps(monkeypatch):
    return Laps(monkeypatch)


def judged(laps, lost):
    """Machine 0, with a clock of the test's own, and no thread."""
    made = Pulse("127.0.0.1", "first", 0, 2, lost, 10.0)
    made._over = laps
    return made


def test_time_in_which_this_machine_stood_still_makes_nobody_silent(laps):
    lost, heard = [], {}
    one = judged(laps, lost.append)
    assert one._look(Words("5", "5"), heard) == []
    laps.judge(one, *[1.0] * 5, 3600.0)
    # Before the others have had the time to say anything.
    assert one._look(Words("6", "5"), heard) == []
    assert lost == []
    # What is silent from then on is found all the same.
    laps.judge(one, *[1.0] * 4)
    assert lost == ["the rendezvous at 127.0.0.1 has not answered for 10 s"]
    assert one._look(Words("7", "5"), heard) == [1]


def test_a_machine_that_stands_still_again_and_again_hears_that_the_others_live(laps):
    lost, heard = [], {}
    one = judged(laps, lost.append)
    for number in range(100):
        laps.judge(one, 20.0)
        assert one._look(Words(str(number), str(number)), heard) == []
        one._answered = one._awake_s()
    assert lost == []


@pytest.mark.parametrize("look_s", [1, 4])
def test_a_silent_machine_is_noticed_within_one_look_more_than_the_silence_however_slow_a_look_is(laps, look_s):
    one, heard = judged(laps, [].append), {}
    one._answered = 1e6  # only the machine is in question here
    one._look(Words("5", "5"), heard)
    began = laps.now
    while not one._look(Words("6", "5"), heard):
        laps.judge(one, *[1.0] * look_s)
        assert laps.now - began <= 10 + look_s
    assert laps.now - began > 10


@pytest.mark.parametrize(
    ("where", "place"),
    [("login1", ("login1", 29400)), ("login1:7", ("login1", 7)), ("[fd00::1]:7", ("fd00::1", 7))],
)
def test_a_place_may_leave_its_port_to_the_default(where, place, told):
    made = Pulse(where, "first", 0, 2, told.put)
    assert (made._host, made._port) == place
    with pytest.raises(ConfigError, match="write HOST:PORT"):
        Pulse("login1:x", "first", 0, 2, told.put)


def test_one_worker_of_each_of_several_machines_does_it_and_none_elsewhere(monkeypatch, told):
    assert Pulse.of_environment("first", 0, told.put) is None
    monkeypatch.setenv(pulse.VARIABLE, "10.0.0.1:29400")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_RANK", "1")
    assert Pulse.of_environment("first", 0, told.put) is not None
    assert Pulse.of_environment("first", 1, told.put) is None
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert Pulse.of_environment("first", 0, told.put) is None
