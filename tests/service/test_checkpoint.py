"""Whole or absent: what a checkpoint holds, what becomes of damage, a full disk, a killed writer, and what is kept."""

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


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StorageError, match="checkpoints"):
        write(tmp_path / "checkpoints", 1)


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.writing").mkdir()
    (tmp_path / ".step-00000005.writing" / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == (None, [])
    assert len(list(tmp_path.iterdir())) == 1, "to look is not to tidy: another process may be writing"
    write(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_one_that_stepped_aside_for_its_successor_comes_back_if_that_never_arrived(tmp_path: Path) -> None:
    path = write(tmp_path, 5).path
    path.rename(tmp_path / ".step-00000005.old")
    checkpoint.tidy(tmp_path)
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
