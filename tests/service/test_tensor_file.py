"""Files of tensors, read by the library whose format it is."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from service.training import tensor_file

TYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, kind in enumerate(TYPES):
        for shape in ((), (0,), (3,), (2, 3, 4, 5)):
            values = torch.randint(0, 100, shape, generator=generator).to(kind)
            tensors[f"{number}.{len(shape)}.{'x'.join(map(str, shape))}"] = values
    tensors["strided"] = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)[:, 1:]
    tensors["repeated"] = torch.ones(1).expand(5)
    tensors["same"] = tensors["strided"]
    tensors["ünï.cödé"] = torch.full((2,), float("nan"))
    tensor_file.write(tmp_path / "a", tensors)
    back = load_file(tmp_path / "a")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        raw = [one.contiguous().reshape(-1).view(torch.uint8).tolist() for one in (back[name], value)]
        assert raw[0] == raw[1], name


def test_what_it_says_about_the_file_is_true(tmp_path: Path) -> None:
    # More than one piece of a mebibyte, and no multiple of it.
    said = tensor_file.write(tmp_path / "a", {"x": torch.arange(700_001), "y": torch.ones(3, dtype=torch.bool)})
    content = (tmp_path / "a").read_bytes()
    assert said == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_tensors_begin_at_multiples_of_their_width(tmp_path: Path) -> None:
    tensor_file.write(tmp_path / "a", {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(2), "c": torch.tensor(1)})
    with safe_open(tmp_path / "a", "pt") as file:
        assert set(file.keys()) == {"a", "b", "c"}
    content = (tmp_path / "a").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert header % 8 == 0
    assert content[8 + header :] == (1).to_bytes(8, "little") + torch.ones(2).numpy().tobytes() + b"\x01" * 3


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        tensor_file.write(tmp_path / "a", {})
    assert (tmp_path / "a").read_text() == "mine"
