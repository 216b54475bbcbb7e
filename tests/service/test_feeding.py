"""What the workers agree on before they train: threads stand in for the processes of two machines."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from service import config
from service.errors import DataError, JobError
from service.training import distributed, feeding
from service.training.distributed import World


def world(rank: int, size: int = 3) -> World:
    return World(rank, size, rank, size, torch.device("cpu"))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    shared = dist.HashStore()
    monkeypatch.setattr(distributed, "_store", lambda: shared)
    # In one process the workers number their meetings together.
    monkeypatch.setattr(distributed, "_number", iter([0] * 3))
    monkeypatch.setattr(distributed, "LOOK_S", 0.01)
    return shared


def meet(rank: int, block: Any, ends: dict[int, Any]) -> None:
    try:
        with distributed.however_long(world(rank), "the data"):
            block()
        ends[rank] = time.monotonic()
    except BaseException as error:
        ends[rank] = error


def test_nobody_goes_on_before_the_slowest_is_ready(store: dist.Store) -> None:
    ends: dict[int, Any] = {}
    ready: list[float] = []

    def slow() -> None:
        time.sleep(0.3)
        ready.append(time.monotonic())

    blocks = [slow, lambda: None, lambda: None]
    workers = [threading.Thread(target=meet, args=(rank, block, ends)) for rank, block in enumerate(blocks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert len(ends) == 3
    assert all(end >= ready[0] for end in ends.values())


def test_those_who_wait_hear_that_another_has_failed(store: dist.Store) -> None:
    ends: dict[int, Any] = {}

    def fail() -> None:
        raise DataError("no such folder")

    meet(1, fail, ends)
    meet(0, lambda: None, ends)
    assert isinstance(ends[1], DataError)
    assert isinstance(ends[0], JobError)
    assert "worker 1: no such folder" in str(ends[0])


def test_ranks_that_have_opened_other_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "data" / split / "cat/a.png")
    (tmp_path / "job.yaml").write_text(f"data: {{name: folder, root: {tmp_path}/data, size: 32}}\n")
    job = config.load(tmp_path / "job.yaml", [])
    assert len(feeding.open_splits(job, world(0, 1))) == 2

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        parts = torch.stack([tensor] * 4)
        parts[2:, 1, 5] ^= 1
        return parts

    monkeypatch.setattr(distributed, "gather", gather)
    with pytest.raises(DataError, match=r"split 'val' of ranks 2, 3 is not that of rank 0"):
        feeding.open_splits(job, world(0, 1))
