"""What a worker does that makes no progress, or hears nothing of the others."""

import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from service.errors import DataError, LostPeerError
from service.run_folder import RunFolder
from service.training import distributed
from service.training.distributed import World
from service.training.watchdog import Watchdog


def world(size: int = 1) -> World:
    return World(0, size, 0, size, torch.device("cpu"))


def watchdog(folder: Path, timeout_s: float, size: int = 1) -> tuple[Watchdog, list[int]]:
    """One that only notes the exit code with which it would have ended the process."""
    ended: list[int] = []
    return Watchdog(RunFolder(folder), world(size), timeout_s, end=ended.append), ended


def test_a_worker_that_waits_too_long_for_a_batch_ends_with_its_step_its_place_and_its_stack(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    release = threading.Event()

    def batches() -> Iterator[int]:
        # The first may take its time.
        time.sleep(1.0)
        yield 1
        release.wait(20)

    dog, ended = watchdog(tmp_path, 0.3)
    with dog:
        for _ in dog.through(batches(), "waiting for a batch", "training"):
            dog.step(7)
            threading.Timer(1.0, release.set).start()
    assert ended[0] == 1
    told = RunFolder(tmp_path).read("error.json")["message"]
    assert "no progress within timeout_s=0.3: worker 0: step 7, waiting for a batch for 0 s, at " in told
    assert "wait < threading.py" in told
    assert "in batches" in capfd.readouterr().err


def test_a_worker_that_goes_on_is_left_alone_however_long_it_takes(tmp_path: Path) -> None:
    dog, ended = watchdog(tmp_path, 0.4)
    began = time.monotonic()
    with dog:
        for number in dog.through(count(), "waiting", "working"):
            time.sleep(0.1)
            if number == 12:
                break
    assert time.monotonic() - began > 1.2
    assert ended == []
    assert not (tmp_path / "error.json").exists()


def test_nobody_is_watched_after_the_end(tmp_path: Path) -> None:
    dog, ended = watchdog(tmp_path, 0.2)
    with dog:
        pass
    time.sleep(0.6)
    assert ended == []


def sign(folder: Path, rank: int, count: int, attempt: str) -> None:
    told = {"attempt": attempt, "rank": rank, "count": count, "step": 4, "phase": "training", "idle_s": 1.0}
    RunFolder(folder / "workers").write(f"rank{rank}.json", told | {"place": "loop.py:1 train"})


def test_a_timeout_names_who_stopped_answering_and_the_last_step_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker 1 lives on, worker 2 froze, worker 3 is of an attempt before this one."""
    monkeypatch.setattr(distributed, "from_main", lambda text, device: "now")
    dog, _ = watchdog(tmp_path, 0.5, size=4)
    over = threading.Event()

    def live() -> None:
        for number in count():
            sign(tmp_path, 1, number, "now")
            if over.wait(0.02):
                return

    def lose() -> None:
        sign(tmp_path, 2, 5, "now")
        sign(tmp_path, 3, 5, "before")
        thread.start()
        dog.step(5)
        raise RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 500ms for recv")

    thread = threading.Thread(target=live)
    try:
        with pytest.raises(LostPeerError) as caught, dog:
            lose()
    finally:
        over.set()
        thread.join()
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
    dog, _ = watchdog(tmp_path, 5, size=2)
    with pytest.raises(DataError, match="a shard is gone"), dog:
        raise DataError("a shard is gone")
