"""Whole or absent: what a checkpoint holds, what becomes of damage, a full disk, a killed writer, and what is kept."""

import errno
import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.errors import CheckpointError, StorageError
from service.training import checkpoint


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return {"conv.weight": weight, "fc.bias": torch.randn(5, generator=generator), "count": torch.tensor(7)}


def write(folder: Path, step: int, seed: int = 0, **metrics: float) -> checkpoint.Checkpoint:
    parts = {"weights": tensors(seed), "optimizer": {}}
    return checkpoint.save(folder, step, parts, facts={"seed": seed, "name": "a"}, metrics=metrics)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path, 12, seed=3, **{"val/top1": 0.5})
    found, problems = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.step, found.facts, found.metrics, problems) == (12, {"seed": 3, "name": "a"}, {"val/top1": 0.5}, [])
    back = found.tensors("weights")
    for name, tensor in tensors(3).items():
        assert back[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes()
    assert found.tensors("optimizer") == {}


def test_views_of_one_buffer_are_saved_apart(tmp_path: Path) -> None:
    flat = torch.arange(10.0)
    checkpoint.save(tmp_path, 1, {"weights": {"a": flat[:4], "b": flat[4:], "c": flat[:4]}}, facts={})
    back = checkpoint.read(tmp_path / "step-00000001").tensors("weights")
    assert back["a"].tolist() == back["c"].tolist() == [0, 1, 2, 3]
    assert back["b"].tolist() == [4, 5, 6, 7, 8, 9]


def test_there_is_nothing_but_safetensors_and_json_with_the_checksums_of_both(tmp_path: Path) -> None:
    path = write(tmp_path, 1).path
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    index = json.loads((path / "checkpoint.json").read_text())
    for name, written in index["files"].items():
        content = (path / name).read_bytes()
        assert written == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "emptied", "gone"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2).path / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "gone":
        path.unlink()
    elif damage == "one bit":
        content[middle] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: middle if damage == "truncated" else 0])
    found, (problem,) = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step-00000002" in problem
    assert name in problem


def test_a_changed_step_in_the_index_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, 2).path / "checkpoint.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read(path.parent)


def test_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path, 2).path / "checkpoint.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(CheckpointError, match="format 9; this version reads format 1"):
        checkpoint.read(path.parent)


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) == (None, [])
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("fails_at", range(9))
def test_a_full_disk_at_any_moment_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    write(tmp_path, 1)
    calls = 0

    def fail_in_turn(original):  # type: ignore[no-untyped-def]
        def function(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == fails_at + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments, **options)

        return function

    with monkeypatch.context() as patch:
        for name in ("save_file", "_flush", "_digest", "_replace"):
            patch.setattr(checkpoint, name, fail_in_turn(getattr(checkpoint, name)))
        with pytest.raises(StorageError, match="No space left"):
            write(tmp_path, 2)
    # 3 calls a file, 2 files, then the index, the folder and the renaming: the last of them have it written.
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.newest(tmp_path)[0] is not None


def test_a_real_write_error_of_safetensors_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda values, path: real(values, Path("/dev/full")))
    with pytest.raises(StorageError, match="ones before are untouched"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StorageError, match="checkpoints"):
        write(tmp_path / "checkpoints", 1)


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.writing").mkdir()
    (tmp_path / ".step-00000005.writing" / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == (None, [])
    write(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_one_that_stepped_aside_for_its_successor_comes_back_if_that_never_arrived(tmp_path: Path) -> None:
    path = write(tmp_path, 5).path
    path.rename(tmp_path / ".step-00000005.old")
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 5


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 5, seed=1)
    write(tmp_path, 5, seed=2)
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.facts["seed"] == 2
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 4)])
def test_the_newest_and_the_best_are_kept(tmp_path: Path, mode: str, best: int) -> None:
    for step, value in enumerate((0.1, 0.9, 0.5, 0.05, 0.5, 0.4), start=1):
        write(tmp_path, step, **{"val/top1": value})
    checkpoint.prune(tmp_path, 2, "val/top1", mode)
    assert [int(path.name[5:]) for path in checkpoint.find(tmp_path)] == [6, 5, best]


def test_without_the_metric_only_the_newest_are_kept_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step-00000003" / "checkpoint.json").write_text("{")
    checkpoint.prune(tmp_path, 1, "val/top1", "max")
    assert [path.name for path in checkpoint.find(tmp_path)] == ["step-00000003", "step-00000002"]


def test_a_damaged_one_that_resume_passed_over_does_not_push_out_the_good_ones(tmp_path: Path) -> None:
    write(tmp_path, 800, top1=0.5)
    damaged = write(tmp_path, 900, top1=0.9).path / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:40])
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 800
    write(tmp_path, 850, top1=0.6)
    checkpoint.prune(tmp_path, 1, "top1", "max", newest_step=850)
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 850


def test_nan_is_no_metric(tmp_path: Path) -> None:
    write(tmp_path, 1, **{"val/top1": float("nan")})
    assert checkpoint.read(tmp_path / "step-00000001").metrics == {}


def test_another_number_of_classes_is_told_by_name_and_number() -> None:
    held = {"fc.weight": torch.zeros(10, 8), "old.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_fit(Path("here"), held, {"fc.weight": (12, 8), "new.weight": (1,)})
    for part in (
        "here",
        "fc has 10 outputs there and 12 here",
        "old.weight: the model has none",
        "new.weight: missing",
    ):
        assert part in str(caught.value)


def test_weights_that_fit_pass() -> None:
    checkpoint.check_fit(Path("here"), {"fc.weight": torch.zeros(10, 8)}, {"fc.weight": (10, 8)})
