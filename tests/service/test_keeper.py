"""Saving while training goes on: what is in a checkpoint, when it counts, and what a failure does."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service import config
from service.errors import StorageError
from service.ownership import Ownership
from service.run_folder import RunFolder
from service.training import checkpoint, distributed, keeper, writer
from service.training.distributed import World
from service.training.keeper import RunKeeper


class State:
    """An engine's state, without the engine."""

    world = World(0, 1, 0, 1, torch.device("cpu"))

    def __init__(self) -> None:
        self.tensor = torch.zeros(100)

    def weights(self) -> dict[str, Tensor]:
        return {"w": self.tensor}

    def optimizer_state(self) -> dict[str, Tensor]:
        return {"momentum.w": self.tensor + 1}

    def scale_state(self) -> dict[str, float]:
        return {"scale": 8.0}


class Gate:
    """Holds every fsync back until it is opened, or makes it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.opened.set()
        self.fails = False
        self._real = os.fsync
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, descriptor: int) -> None:
        assert self.opened.wait(120)
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._real(descriptor)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def made(tmp_path: Path, state: State) -> Iterator[RunKeeper]:
    facts = {"seed": 3}
    folder = RunFolder(tmp_path)
    job = config.resolve({"checkpoint": {"keep_last": 2}})
    display: Any = None
    engine: Any = state
    made = RunKeeper(job, folder, engine, None, display, None, facts, lambda: {"spent": {"wall_s": 1.5}, "meters": [1]})
    yield made
    made.close()


def newest(folder: Path) -> checkpoint.Checkpoint | None:
    found, problems = checkpoint.newest(folder / "checkpoints")
    assert problems == []
    return found


def test_training_goes_on_while_it_is_written_and_changes_nothing_in_it(
    tmp_path: Path, made: RunKeeper, state: State, gate: Gate
) -> None:
    gate.opened.clear()
    made.save(5, {"val/top1": 0.5})
    state.tensor.fill_(9.0)
    assert made.last_saved() == "the start (no checkpoint yet)"
    assert list((tmp_path / "checkpoints").glob("step-*")) == []
    gate.opened.set()
    made.finish_writing()
    assert made.last_saved() == f"checkpoint {tmp_path}/checkpoints/step-00000005"
    found = newest(tmp_path)
    assert found is not None
    assert (found.tensors("weights")["w"] == 0).all()
    assert (found.tensors("optimizer")["momentum.w"] == 1).all()
    assert found.facts == {"seed": 3, "scale": {"scale": 8.0}, "spent": {"wall_s": 1.5}, "meters": [1]}
    assert found.metrics == {"val/top1": 0.5}


def test_with_wait_it_is_on_the_disk(tmp_path: Path, made: RunKeeper) -> None:
    made.save(5, {}, wait=True)
    assert (tmp_path / "checkpoints" / "step-00000005" / "checkpoint.json").exists()


def test_a_save_waits_for_the_one_before_and_takes_the_state_only_then(
    tmp_path: Path, made: RunKeeper, state: State, gate: Gate
) -> None:
    gate.opened.clear()
    made.save(1, {})
    second = threading.Thread(target=made.save, args=(2, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert list((tmp_path / "checkpoints").glob("*2*")) == [], "one is written at a time"
    state.tensor.fill_(2.0)
    gate.opened.set()
    second.join(120)
    made.finish_writing()
    first, last = (checkpoint.read(tmp_path / "checkpoints" / f"step-0000000{step}") for step in (1, 2))
    assert first.tensors("weights")["w"][0] == 0
    assert last.tensors("weights")["w"][0] == 2


def test_a_failure_shows_at_once_and_is_raised_when_it_is_waited_for(
    tmp_path: Path, made: RunKeeper, gate: Gate
) -> None:
    made.save(1, {}, wait=True)
    assert not made.write_failed()
    gate.fails = True
    made.save(2, {})
    while not made.write_failed():
        pass
    assert made.last_saved().endswith("step-00000001")
    with pytest.raises(StorageError, match=r"step-00000002: cannot write .*Input/output error.*before are untouched"):
        made.finish_writing()
    gate.fails = False
    made.save(3, {}, wait=True)
    assert [path.name for path in checkpoint.find(tmp_path / "checkpoints")] == ["step-00000003", "step-00000001"]


def test_a_failure_that_nobody_asked_about_is_raised_by_the_next_save(made: RunKeeper, gate: Gate) -> None:
    gate.fails = True
    made.save(1, {})
    with pytest.raises(StorageError, match="step-00000001"):
        made.save(2, {})


def test_ending_in_any_case_lets_the_writing_come_to_its_end(tmp_path: Path, made: RunKeeper, gate: Gate) -> None:
    gate.opened.clear()
    made.save(1, {})
    threading.Timer(0.2, gate.opened.set).start()
    made.close()
    assert newest(tmp_path) is not None
    gate.fails = True
    made.save(2, {})
    made.close()
    assert [path.name for path in checkpoint.find(tmp_path / "checkpoints")] == ["step-00000001"]


def test_old_ones_are_deleted_and_the_best_is_kept(tmp_path: Path, made: RunKeeper) -> None:
    for step, value in enumerate((0.1, 0.9, 0.3, 0.2, 0.1), start=1):
        made.save(step, {"val/top1": value})
    made.finish_writing()
    assert [int(path.name[5:]) for path in checkpoint.find(tmp_path / "checkpoints")] == [5, 4, 2]
    assert made.is_best({"val/top1": 0.95})
    assert not made.is_best({"val/top1": 0.85})


def test_going_back_to_an_earlier_one_forgets_what_came_after_it(tmp_path: Path, made: RunKeeper) -> None:
    made.save(1, {"val/top1": 0.2}, wait=True)
    first = newest(tmp_path)
    made.save(2, {"val/top1": 0.9}, wait=True)
    made.go_on_from(first)
    made.finish_writing()
    assert made.last_saved().endswith("step-00000001")
    assert made.is_best({"val/top1": 0.5})


def test_nothing_is_written_once_another_job_has_the_folder(tmp_path: Path, state: State) -> None:
    owner = Ownership(tmp_path)
    owner.take()
    job, engine, display = config.resolve({}), Any, Any
    engine = state
    made = RunKeeper(job, RunFolder(tmp_path), engine, None, display, None, {}, dict, owner)
    made.save(1, {}, wait=True)
    with owner._writing:
        Ownership(tmp_path)._beat()
    with pytest.raises(StorageError, match="has taken this run over"):
        made.save(2, {}, wait=True)
    made.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_an_owner_that_was_succeeded_writes_no_record_and_ends_all_workers(tmp_path: Path, state: State) -> None:
    owner, folder = Ownership(tmp_path), RunFolder(tmp_path)
    owner.take()
    run, display, engine = Said(), Said(), state
    made = RunKeeper(config.resolve({}), folder, engine, None, display, run, {}, dict, owner)  # type: ignore[arg-type]
    made.record({"train/loss": 1.0}, 1)
    assert not made.write_failed()
    made.finish_writing()
    with owner._writing:
        Ownership(tmp_path)._beat()
    with pytest.raises(StorageError):
        # As the thread that gives the signs of life does.
        owner.check()
    made.record({"train/loss": 2.0}, 2)
    assert made.write_failed()
    with pytest.raises(StorageError, match="has taken this run over"):
        made.finish_writing()
    made.close()
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1]
    assert run.steps == [1]


class Said:
    """A run of the tracking server, and a terminal, that note which steps they were told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.steps.append(step)

    def figures(self, metrics: dict[str, float]) -> None: ...


def test_what_is_best_is_what_the_main_worker_sees(
    tmp_path: Path, state: State, made: RunKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a shared disk that shows the second worker one checkpoint less."""
    for step, top1 in ((1, 0.1 + 0.2), (2, 0.7), (3, 0.9)):
        made.save(step, {"val/top1": top1}, wait=True)
    second = checkpoint.read(checkpoint.place(tmp_path / "checkpoints", 2))
    told: list[str] = []

    def send(text: str, device: torch.device) -> str:
        told.append(text)
        return text

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "from_main", send)
        made.go_on_from(second)
    shutil.rmtree(second.path)
    other = State()
    other.world = World(1, 2, 1, 2, torch.device("cpu"))
    follower = RunKeeper(config.resolve({}), RunFolder(tmp_path), other, None, None, None, {}, dict)  # type: ignore[arg-type]
    received = iter(told)
    monkeypatch.setattr(distributed, "from_main", lambda text, device: next(received))
    follower.go_on_from(second)
    for worker in (made, follower):
        assert not worker.is_best({"val/top1": 0.7})
        assert worker.is_best({"val/top1": 0.7000000000000001})
    assert list(received) == []


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_the_clock_asks_every_minute_unless_saving_would_take_more_than_its_share(
    tmp_path: Path, state: State, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(keeper, "time", clock)
    # A save that took its real time would be asked for less often.
    monkeypatch.setattr(writer, "time", clock)
    job, display = config.resolve({}), None
    engine: Any = state
    made = RunKeeper(job, RunFolder(tmp_path), engine, None, display, None, {}, dict)  # type: ignore[arg-type]

    def due_after(seconds: float) -> bool:
        clock.now += seconds
        due = made.save_is_due()
        clock.now -= seconds
        return due

    assert not due_after(59)
    assert due_after(61)
    made.save(1, {}, wait=True)
    assert not due_after(59)
    assert due_after(61)
    # A save that training waits 4 s for comes every 200 s: 2 %.
    weights = state.weights
    monkeypatch.setattr(state, "weights", lambda: (setattr(clock, "now", clock.now + 4), weights())[1])
    made.save(2, {}, wait=True)
    assert not due_after(199)
    assert due_after(201)
    # So does one that takes 40 s to write, while nobody waits: the disk is busy for a fifth of the time.
    monkeypatch.setattr(state, "weights", weights)
    made.save(3, {}, wait=True)
    made._writer.took_s = 40.0
    assert not due_after(199)
    assert due_after(201)
    gate.opened.clear()
    made.save(4, {})
    assert not due_after(10_000), "one is still being written"
    gate.opened.set()
    made.close()


def test_without_minutes_the_clock_never_asks(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(keeper, "time", clock)
    job = config.resolve({"checkpoint": {"every_minutes": None}})
    made = RunKeeper(job, RunFolder(tmp_path), state, None, None, None, {}, dict)  # type: ignore[arg-type]
    clock.now += 1e6
    assert not made.save_is_due()
