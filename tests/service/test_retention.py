"""What is deleted, and what never is: the last good one, whatever else is damaged."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from service.errors import CheckpointError
from service.training import checkpoint
from service.training.retention import Retention


def write(folder: Path, step: int, **metrics: float) -> checkpoint.Checkpoint:
    parts = {"weights": {"w": torch.full((50,), float(step))}, "optimizer": {"m.w": torch.zeros(20)}}
    return checkpoint.save(folder, step, parts, facts={}, metrics=metrics)


def prune(folder: Path, keep_last: int, metric: str = "top1", mode: str = "max", step: int | None = None) -> list[Path]:
    return Retention(keep_last, metric, mode).prune(folder, step)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in checkpoint.find(folder))


def sound(folder: Path) -> list[int]:
    """Steps of those whose every byte is right, found without the module under test."""
    found = []
    for path in checkpoint.find(folder):
        try:
            checkpoint.read(path).verify()
        except CheckpointError:
            continue
        found.append(int(path.name[5:]))
    return sorted(found)


def damage(path: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    how = chance.choice(("bit", "cut", "empty", "gone"))
    if how == "gone":
        file.unlink()
    elif how == "bit":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    else:
        file.write_bytes(content[: chance.randrange(1, len(content)) if how == "cut" else 0])


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 4)])
def test_the_newest_and_the_best_are_kept(tmp_path: Path, mode: str, best: int) -> None:
    for step, value in enumerate((0.1, 0.9, 0.5, 0.05, 0.5, 0.4), start=1):
        write(tmp_path, step, top1=value)
    deleted = prune(tmp_path, 2, mode=mode)
    assert steps(tmp_path) == sorted({6, 5, best})
    assert {int(path.name[5:]) for path in deleted} == {1, 2, 3, 4} - {best}
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in checkpoint.find(tmp_path)][::-1]


def test_the_best_may_be_the_last(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, top1=step / 10)
    prune(tmp_path, 1)
    assert steps(tmp_path) == [3]


def test_without_the_metric_only_the_newest_are_kept_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step-00000003" / "checkpoint.json").write_text("{")
    prune(tmp_path, 1)
    assert steps(tmp_path) == [2, 3]


def test_a_newer_one_whose_tensors_are_damaged_does_not_push_out_the_last_good_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    file = tmp_path / "step-00000003" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    prune(tmp_path, 1)
    assert sound(tmp_path) == [2]
    prune(tmp_path, 2)
    assert sound(tmp_path) == [2]


def test_a_damaged_best_is_replaced_by_the_best_that_is_sound(tmp_path: Path) -> None:
    for step, value in enumerate((0.5, 0.9, 0.7, 0.1), start=1):
        write(tmp_path, step, top1=value)
    (tmp_path / "step-00000002" / "weights.safetensors").write_bytes(b"")
    prune(tmp_path, 1)
    assert sound(tmp_path) == [3, 4]


def test_a_damaged_one_that_resume_passed_over_does_not_push_out_the_good_ones(tmp_path: Path) -> None:
    write(tmp_path, 800, top1=0.5)
    damaged = write(tmp_path, 900, top1=0.9).path / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:40])
    write(tmp_path, 850, top1=0.6)
    prune(tmp_path, 1, step=850)
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 850
    assert steps(tmp_path) == [850, 900]


def test_one_that_was_hashed_when_it_was_written_is_not_read_again_unless_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = checkpoint.Checkpoint.verify
    monkeypatch.setattr(checkpoint.Checkpoint, "verify", lambda own: (read.append(own.step), real(own)))
    retention = Retention(2, "top1", "max")
    for step in (1, 2, 3, 4):
        retention.written(write(tmp_path, step))
        retention.prune(tmp_path, step)
    assert read == []
    file = tmp_path / "step-00000004" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    retention.written(write(tmp_path, 5))
    retention.prune(tmp_path, 5)
    assert read == [4]
    assert sound(tmp_path) == [3, 5]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_the_newest_good_ones_stay(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    keep_last, mode = chance.randint(1, 3), chance.choice(("max", "min"))
    retention = Retention(keep_last, "top1", mode)
    values: dict[int, float] = {}
    for step in range(1, 25):
        there = checkpoint.find(tmp_path)
        if there and chance.random() < 0.4:
            damage(chance.choice(there[:2]), chance)
        if chance.random() < 0.2:
            # The process was started anew, and remembers nothing.
            retention = Retention(keep_last, "top1", mode)
        values[step] = chance.random()
        metrics = {"top1": values[step]} if chance.random() < 0.6 else {}
        retention.written(write(tmp_path, step, **metrics))
        before = sound(tmp_path)
        scored = [one for one in before if checkpoint.read(checkpoint.place(tmp_path, one)).metrics]
        retention.prune(tmp_path, step)
        after = sound(tmp_path)
        assert step in after
        assert after[-keep_last:] == before[-keep_last:], "as many of the newest good ones as there were"
        if scored:
            assert (max if mode == "max" else min)(scored, key=values.__getitem__) in after
        assert len(after) <= max(keep_last + 1, len(before) if len(before) < keep_last else 0)


def test_a_folder_that_cannot_be_deleted_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        write(tmp_path, step)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        assert prune(tmp_path, 1) == []
    assert steps(tmp_path) == [1, 2]
    shutil.rmtree(tmp_path / "step-00000001")
