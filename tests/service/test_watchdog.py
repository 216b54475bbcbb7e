"""What a worker does that makes no progress, or hears nothing of the others."""

import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from service.errors import DataError, LorotError, LostPeerError
from service.run_folder import RunFolder
from service.training import distributed, watchdog
from service.training.distributed import World
from service.training.watchdog import Watchdog
from tests.service.watched_worker import NO_TIMER, ended


def world(size: int) -> World:
    return World(0, size, 0, size, torch.device("cpu"))


def test_a_worker_that_waits_too_long_for_a_batch_ends_with_its_step_its_place_and_its_stack(tmp_path: Path) -> None:
    body = """
def batches():
    now[0] += 500  # The first may take its time.
    looked()
    yield 1
    now[0] += 1.5
    time.sleep(100)

with dog:
    for _ in dog.through(batches(), "waiting for a batch", "training"):
        dog.step(7)
        print("the first came", flush=True)
print("left alone")
"""
    worker = ended(tmp_path, 1, NO_TIMER + body)
    assert (worker.returncode, worker.stdout) == (1, "the first came\n"), worker.stderr
    told = RunFolder(tmp_path).read("error.json")["message"]
    assert re.search(r"no progress within timeout_s=1: worker 0: step 7, waiting for a batch for \d+ s, at ", told)
    assert re.search(r" at <string>:\d+ batches < watchdog.py:\d+ through", told)
    assert "in batches" in worker.stderr


def test_a_worker_that_goes_on_is_left_alone_however_long_it_takes(tmp_path: Path) -> None:
    body = """
dog._every_s = 0.02
with dog:
    for number in dog.through(count(), "waiting", "working"):
        now[0] += 0.9 * timeout_s
        looked()
        if number == 20:
            break
print("left alone")
"""
    worker = ended(tmp_path, 600, body)
    assert (worker.returncode, worker.stdout) == (0, "left alone\n"), worker.stderr
    assert not (tmp_path / "error.json").exists()


def test_a_worker_that_keeps_pythons_lock_is_ended_too_and_shows_where(tmp_path: Path) -> None:
    body = """
with dog:
    for _ in dog.through(iter([1, 2]), "waiting", "working"):
        looked()
        ctypes.PyDLL(None).sleep(100)
print("left alone")
"""
    worker = ended(tmp_path, 1, body)
    assert (worker.returncode, worker.stdout) == (1, ""), worker.stderr
    assert "Timeout" in worker.stderr
    assert 'File "<string>"' in worker.stderr


TWO = """
import contextlib
from service.training import distributed
distributed.however_long = lambda world, what: contextlib.nullcontext()
dog = Watchdog(RunFolder(folder), World(0, 2, 0, 2, torch.device("cpu")), timeout_s)

def batches():
    yield 1
    now[0] += 1.5
    threading.Event().wait(100)

"""
FOR_DATA = """
with dog:
    for _ in dog.through(batches(), "waiting for a batch", "training"):
        dog.step(7)
"""
FOR_ANOTHER = """
with dog:
    for _ in dog.through(batches(), "waiting for a batch", "training"):
        dog.step(7)
        now[0] += 1.5
        threading.Event().wait(100)
"""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (FOR_DATA, 1, "no progress within timeout_s=1: worker 0: step 7, waiting for a batch for "),
        (FOR_ANOTHER, 8, "worker 0, after step 7: worker 1 stopped answering within timeout_s=1"),
    ],
)
def test_who_waits_for_data_blames_nobody_and_who_waits_for_another_says_for_whom(
    body: str, code: int, said: str, tmp_path: Path
) -> None:
    """The others are not there at all, and no collective operation fails in the worker's place."""
    worker = ended(tmp_path, 1, NO_TIMER + TWO + body)
    assert worker.returncode == code, worker.stderr
    told = RunFolder(tmp_path).read("error.json")
    assert told["message"].startswith(said)
    assert "worker 1: never gave a sign" in told["message"]


def test_a_machine_that_hears_nothing_of_the_rendezvous_ends_its_worker_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{nobody.getsockname()[1]}"
        for name, value in (("LOROT_RENDEZVOUS", where), ("GROUP_WORLD_SIZE", "2"), ("GROUP_RANK", "1")):
            monkeypatch.setenv(name, value)
        body = """
with dog:
    for _ in dog.through(count(), "waiting", "working"):
        dog.step(3)
        time.sleep(0.05)
"""
        worker = ended(tmp_path, 600, body)
    assert worker.returncode == 8, worker.stderr
    told = RunFolder(tmp_path).read("error.json")["message"]
    assert told.startswith(f"worker 0, after step 3: the rendezvous at {where} has not answered for 10 s")
    assert "Thread 0x" in worker.stderr


def test_nobody_is_watched_after_the_end(tmp_path: Path) -> None:
    body = """
timers = []
watchdog.faulthandler = SimpleNamespace(
    dump_traceback_later=lambda *_, **__: timers.append(1), cancel_dump_traceback_later=timers.clear
)
dog._every_s = 0.01
with dog:
    for _ in dog.through(iter([1]), "waiting", "working"):
        looked()
    assert timers
now[0] += 1000
time.sleep(0.5)
print(f"left alone, timers: {len(timers)}")
"""
    worker = ended(tmp_path, 1, body)
    assert (worker.returncode, worker.stdout) == (0, "left alone, timers: 0\n"), worker.stderr
    assert not (tmp_path / "error.json").exists()


def test_the_timer_has_the_limit_of_what_is_done_from_its_first_moment_and_lets_a_report_come_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    timer = SimpleNamespace(
        dump_traceback_later=lambda limit_s, **_: limits.append(limit_s),
        cancel_dump_traceback_later=lambda: None,
        dump_traceback=lambda **_: None,
    )
    monkeypatch.setattr(watchdog, "faulthandler", timer)
    ended: list[LorotError] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, error: ended.append(error))
    dog = Watchdog(RunFolder(tmp_path), world(1), 1.0)
    dog._every_s = 3600.0  # the watching thread does not look in this test
    with dog:
        with dog.together("loading"):
            assert limits == [1200.0]
        assert limits == [1200.0, 2.0]
        dog._give_up(1.5)
        assert len(ended) == 1
        assert limits[2] >= 30
        dog._set_timer()
        dog._lost("nobody answers")
        assert len(ended) == 2
        assert limits[4] >= 30


def test_the_timer_begins_anew_at_every_look_so_that_it_ends_no_worker_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = threading.Semaphore(0)
    timer = SimpleNamespace(
        dump_traceback_later=lambda *_, **__: looks.release(), cancel_dump_traceback_later=lambda: None
    )
    monkeypatch.setattr(watchdog, "faulthandler", timer)
    dog = Watchdog(RunFolder(tmp_path), world(1), 600.0)
    dog._every_s = 0.01
    with dog:
        assert all(looks.acquire(timeout=60) for _ in range(5))


def sign(folder: Path, rank: int, count: int, attempt: str) -> None:
    told = {"attempt": attempt, "rank": rank, "count": count, "step": 4, "phase": "training", "idle_s": 1.0}
    RunFolder(folder / "workers").write(f"rank{rank}.json", told | {"place": "loop.py:1 train"})


def test_a_timeout_names_who_stopped_answering_and_the_last_step_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker 1 lives on, worker 2 froze, worker 3 is of an attempt before this one."""
    monkeypatch.setattr(distributed, "from_main", lambda text, device: "now")
    # As time passes between two looks, it goes on with worker 1 alone.
    passes = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: sign(tmp_path, 1, 6, "now"))
    monkeypatch.setattr(watchdog, "time", passes)
    dog = Watchdog(RunFolder(tmp_path), world(4), 0.5)

    def lose() -> None:
        sign(tmp_path, 1, 5, "now")
        sign(tmp_path, 2, 5, "now")
        sign(tmp_path, 3, 5, "before")
        dog.step(5)
        raise RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 500ms for recv")

    with pytest.raises(LostPeerError) as caught, dog:
        lose()
    told = str(caught.value)
    assert "worker 0, after step 5: worker 2, 3 stopped answering within timeout_s=0.5" in told
    assert "worker 2: step 4, training for 1 s, at loop.py:1 train" in told
    assert "worker 3: never gave a sign" in told


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (torch.distributed.DistNetworkError("the client socket has timed out"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (DataError("data/x.jpg: connection reset by a gremlin"), False),
        (KeyError("gloo/"), False),
    ],
)
def test_the_loss_of_a_worker_is_told_from_other_errors(error: Exception, lost: bool) -> None:
    assert distributed.is_lost_peer(error) == lost


def test_an_error_of_its_own_passes_the_watchdog_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "from_main", lambda text, device: "now")
    dog = Watchdog(RunFolder(tmp_path), world(2), 5)
    with pytest.raises(DataError, match="a shard is gone"), dog:
        raise DataError("a shard is gone")
