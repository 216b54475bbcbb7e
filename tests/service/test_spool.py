"""Records that wait on disk: in order, once, whatever dies or fills up."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import spool
from service.errors import StorageError, TakenError
from service.spool import RefusedError, Sender, Spool, deliver_next


def new_spool(folder: Path, count: int = 0) -> Spool:
    made = Spool(folder / "spool.jsonl", {"run_id": "r"})
    for number in range(count):
        made.append({"op": "n", "number": number})
    return made


def numbers(records: list[spool.Record]) -> list[int]:
    return [record["number"] for record in records]


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 7))
@settings(max_examples=25)
def test_a_receiver_that_fails_at_times_gets_every_record_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, failures: list[bool], width: int
) -> None:
    waiting = new_spool(tmp_path_factory.mktemp("spool"), 20)
    got: list[int] = []
    plan = iter(failures)

    def deliver(records: list[spool.Record]) -> None:
        if next(plan, False):
            raise ConnectionError("away")
        got.extend(numbers(records))

    for _ in range(len(failures) + 2):
        try:
            if deliver_next(waiting, deliver, lambda records: width):
                break
        except ConnectionError:
            continue
    assert got == list(range(20))
    assert waiting.waiting() == 0
    waiting.close()


def test_another_process_goes_on_where_the_killed_one_stopped_sending(tmp_path: Path) -> None:
    first = new_spool(tmp_path, 5)
    first.acknowledge(first.read()[2][1])
    first.close()
    second = Spool(tmp_path / "spool.jsonl")
    assert second.waiting() == 2
    assert numbers([record for record, _ in second.read()]) == [3, 4]
    assert second.header() == {"run_id": "r"}
    assert numbers(list(second.records())) == [0, 1, 2, 3, 4]


def test_a_line_that_a_power_cut_left_half_written_is_cut_off_and_the_next_one_is_whole(tmp_path: Path) -> None:
    new_spool(tmp_path, 3).close()
    with (tmp_path / "spool.jsonl").open("ab") as file:
        file.write(b'{"op":"n","num')
    again = Spool(tmp_path / "spool.jsonl")
    again.append({"op": "n", "number": 3})
    assert numbers([record for record, _ in again.read()]) == [0, 1, 2, 3]


def test_a_damaged_line_is_left_out_and_the_ones_around_it_arrive(tmp_path: Path) -> None:
    new_spool(tmp_path, 3).close()
    path = tmp_path / "spool.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"op":"n","number":1}', b'{"op":"n\x00#number":1}'))
    again = Spool(path)
    assert numbers([record for record, _ in again.read()]) == [0, 2]


def test_a_record_longer_than_a_read_arrives(tmp_path: Path) -> None:
    long = new_spool(tmp_path, 1)
    long.append({"op": "text", "text": "x" * (3 << 20)})
    long.append({"op": "n", "number": 1})
    got: list[spool.Record] = []
    while not deliver_next(long, got.extend):
        pass
    assert [len(json.dumps(record)) > (3 << 20) for record in got] == [False, True, False]


def test_a_second_job_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    first = new_spool(tmp_path)
    with pytest.raises(TakenError, match="held by another job"):
        Spool(tmp_path / "spool.jsonl", {"run_id": "s"})
    first.close()
    Spool(tmp_path / "spool.jsonl", {"run_id": "r"}).close()


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        Spool(tmp_path / "missing" / "spool.jsonl", {"run_id": "r"})
    assert caught.value.exit_code == 7


def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = new_spool(tmp_path, 1)
    real = os.write
    room = [15]

    def write(file: int, content: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(file, bytes(content[: room[0]]))
        room[0] -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(spool.os, "write", write)
        for number in range(1, 5):
            waiting.append({"op": "n", "number": number})
        assert waiting.waiting() == 5
        assert numbers([record for record, _ in waiting.read()]) == [0]
    assert numbers([record for record, _ in waiting.read()]) == [0, 1, 2, 3, 4]


def test_beyond_its_limit_a_full_disk_costs_records_and_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_WAITING_BYTES", 200)
    waiting = new_spool(tmp_path)

    def full(file: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(spool.os, "write", full)
        for number in range(1000):
            waiting.append({"op": "n", "number": number})
    left = numbers([record for record, _ in waiting.read()])
    assert left == list(range(len(left)))
    assert 5 < len(left) < 10
    waiting.append({"op": "n", "number": 1000})
    assert numbers(list(waiting.records())) == [*left, 1000]


@pytest.mark.parametrize("noted", ["9999999999", "-1", "", "nothing", "1e3"])
def test_where_what_was_sent_is_not_known_all_is_sent_again(noted: str, tmp_path: Path) -> None:
    first = new_spool(tmp_path, 3)
    first.acknowledge(first.read()[1][1])
    first.close()
    (tmp_path / "spool.sent").write_text(noted)
    again = Spool(tmp_path / "spool.jsonl")
    assert numbers([record for record, _ in again.read()]) == [0, 1, 2]
    assert not again.empty()


def test_a_file_that_is_larger_than_it_may_be_is_refused_and_given_up(tmp_path: Path) -> None:
    new_spool(tmp_path, 100).close()
    with pytest.raises(StorageError, match="more than 50 bytes"):
        Spool(tmp_path / "spool.jsonl", most_bytes=50)
    Spool(tmp_path / "spool.jsonl", most_bytes=1 << 20).close()


def test_new_records_do_not_hurry_a_sender_whose_receiver_is_away(tmp_path: Path) -> None:
    waiting = new_spool(tmp_path, 1)
    tried = threading.Semaphore(0)
    asked = [0]

    def deliver(records: list[spool.Record]) -> None:
        asked[0] += 1
        tried.release()
        raise ConnectionError("away")

    sender = Sender(waiting, deliver)
    began = time.monotonic()
    sender.start()
    assert tried.acquire(timeout=60)
    # The first failure is noted a moment after it happened; from then on only the clock wakes the thread.
    while not sender.last_error:
        time.sleep(0.001)
    for number in range(100):
        waiting.append({"op": "n", "number": number})
        sender.wake()
        # Whoever is woken by it has its turn.
        time.sleep(0.0005)
    # Tried again after half a second, one, two: as often as that, however long this took, and not a hundred times.
    assert asked[0] <= 1 + (time.monotonic() - began) / 0.5
    assert sender.stop(60)


def test_a_refused_record_does_not_take_its_neighbours_with_it(tmp_path: Path) -> None:
    waiting = new_spool(tmp_path, 6)
    got: list[int] = []

    def deliver(records: list[spool.Record]) -> None:
        if 2 in numbers(records):
            raise RefusedError("not this one")
        got.extend(numbers(records))

    while not deliver_next(waiting, deliver, lambda records: 4):
        pass
    assert got == [0, 1, 3, 4, 5]
    assert waiting.empty()


def test_the_sender_keeps_at_it_until_the_receiver_is_back_and_the_writer_never_waits(tmp_path: Path) -> None:
    waiting = new_spool(tmp_path)
    back = threading.Event()
    got: list[int] = []

    def deliver(records: list[spool.Record]) -> None:
        if not back.is_set():
            raise ConnectionError("away")
        got.extend(numbers(records))

    sender = Sender(waiting, deliver, lambda records: 7)
    sender.start()
    began = time.monotonic()
    for number in range(1000):
        waiting.append({"op": "n", "number": number})
        sender.wake()
    # Whoever waited for the sender would pay half a second a record, and more and more.
    assert time.monotonic() - began < 30
    assert not sender.drain(0.2)
    assert sender.last_error == "away"
    back.set()
    assert sender.drain(60, away_s=60)
    assert sender.stop(60)
    assert got == list(range(1000))
