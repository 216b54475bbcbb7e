"""Pickles that ask for more than weights are refused before anything is made; those of usual files go through."""

import io
import math
import pickle
import random
import resource
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from service.errors import CheckpointError
from service.importing import checkpoint_file, pickles

GIGABYTES = pickle.dumps(10**9, 2)[2:-1]
BYTEARRAY = b"c__builtin__\nbytearray\n" + GIGABYTES + b"\x85R"
# The magic number, the protocol and the machine, as PyTorch wrote them before 1.6.
BEFORE = [pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
NAME = b"X\x01\x00\x00\x00a"
COPIES = 50_000


def archived(path: Path, *programs: bytes) -> Path:
    """A file as torch.save writes it, with these bytes for its pickle."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as source:
        entries = [(entry.filename, source.read(entry)) for entry in source.infolist()]
    with zipfile.ZipFile(path, "w") as target:
        for name, content in entries:
            for program in programs if name.endswith("data.pkl") else (content,):
                target.writestr(name, program)
    return path


def old(path: Path, place: int, program: bytes) -> Path:
    """A file in the format before PyTorch 1.6, in which one of the five pickles is this."""
    parts = [*BEFORE, pickle.dumps({}, 2), pickle.dumps([], 2)]
    parts[place] = program
    path.write_bytes(b"".join(parts))
    return path


def held(value: bytes) -> bytes:
    """The program {"a": VALUE}."""
    return b"\x80\x02}" + NAME + value + b"s."


def copying(function: bytes) -> bytes:
    """Copy the same list again and again, a few bytes each time."""
    large = b"](" + b"K\x00K\x00\x86" * COPIES + b"eq\x01"
    return b"\x80\x02](" + large + b"c" + function + b"q\x02" + b"h\x02h\x01\x85R" * COPIES + b"e."


def nested(levels: int) -> bytes:
    """{((t, t), (t, t)), ...): 1}: a key that takes 2 ** levels steps to hash."""
    return b"\x80\x02}K\x00" + b"q\x01h\x01\x86" * levels + b"K\x01s."


BOMBS: list[tuple[str, bytes, str]] = [
    ("a bytearray", held(BYTEARRAY), r"unpickling it would run __builtin__\.bytearray"),
    ("a bytearray of Python 3", held(BYTEARRAY.replace(b"__builtin__", b"builtins")), r"run builtins\.bytearray"),
    ("bytes", held(b"c__builtin__\nbytes\n" + GIGABYTES + b"\x85R"), r"run __builtin__\.bytes"),
    ("a storage", held(b"ctorch.storage\nUntypedStorage\n" + GIGABYTES + b"\x85R"), r"run torch\.storage\.Untyped"),
    ("a tensor", held(b"ctorch\nFloatTensor\n" + GIGABYTES + b"\x85R"), r"run torch\.FloatTensor"),
    ("an object", held(b"ctorch\nTensor\n" + GIGABYTES + b"\x85\x81"), r"run torch\.Tensor"),
    ("encodings", held(b"c_codecs\nencode\n" + NAME + b"X\x06\x00\x00\x00latin1\x86R"), r"run _codecs\.encode"),
    ("a protocol", pickle.dumps(bytearray(5), 4), "do FRAME, which torch.save does not write"),
    ("copies", copying(b"collections\nOrderedDict\n"), r"call collections\.OrderedDict with what it is not"),
    ("counts", copying(b"collections\nCounter\n"), r"call collections\.Counter with what it is not"),
    ("shapes", copying(b"torch\nSize\n"), r"call torch\.Size with what it is not"),
    ("a key of keys", nested(5), "look up what is neither a name nor a number"),
    ("a tower", nested(60), "make tuples in tuples"),
    ("long", b"\x80\x02](" + b"K\x00" * 1_000_001 + b"e.", "take more than 1,000,000 steps"),
]


@pytest.mark.parametrize(("program", "complaint"), [bomb[1:] for bomb in BOMBS], ids=[bomb[0] for bomb in BOMBS])
def test_a_pickle_that_asks_for_more_than_its_bytes_is_refused_before_it_gets_it(
    tmp_path: Path, program: bytes, complaint: str
) -> None:
    path = archived(tmp_path / "a.pth", program)
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=complaint) as caught:
        checkpoint_file.read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kb < 400_000
    assert "torch.save(checkpoint['state_dict'], FILE)" in str(caught.value)


@pytest.mark.parametrize("place", range(5))
def test_each_pickle_of_an_old_file_is_looked_at(tmp_path: Path, place: int) -> None:
    with pytest.raises(CheckpointError, match=r"run __builtin__\.bytearray"):
        checkpoint_file.read(old(tmp_path / "a.pth", place, b"\x80\x02" + BYTEARRAY + b"."))


def test_of_two_pickles_of_one_name_the_one_that_is_loaded_is_looked_at(tmp_path: Path) -> None:
    good = held(b"N")
    for programs in ((good, held(BYTEARRAY)), (held(BYTEARRAY), good)):
        with pytest.warns(UserWarning, match="Duplicate name"):
            path = archived(tmp_path / "a.pth", *programs)
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError, match=r"bytearray|holds no tensors"):
            checkpoint_file.read(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kb < 400_000


def test_storages_that_are_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4)}, path := tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"K\x04Nt") == 1
    path.write_bytes(content.replace(b"K\x04Nt", GIGABYTES + b"Nt"))
    with pytest.raises(CheckpointError, match="would take 4,000,000,000 bytes of tensors, of a file of"):
        checkpoint_file.read(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_what_training_programs_keep_beside_the_weights_goes_through(tmp_path: Path, new_format: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(network.parameters())
    network[2](network[1](network[0](torch.ones(2, 3, 4, 4))).mean((2, 3))).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
    content: dict[str, Any] = {
        "state_dict": network.state_dict(keep_vars=True),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "rng": (torch.get_rng_state(), random.getstate()),
        "best": [math.inf, None, True, -5, 1 << 40, "ä"],
        "kinds": (torch.float16, torch.device("cpu"), torch.Size([2, 3]), torch.zeros(())),
        "layers": OrderedDict(a=1),
    }
    torch.save(content, path := tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    assert isinstance(schedule.state_dict()["milestones"], Counter)
    found = checkpoint_file.read(path)
    assert found.others == tuple(content)[1:]
    for name, value in network.state_dict().items():
        assert torch.equal(found.tensors[name], value)


def test_ordered_dicts_as_python_2_wrote_them_go_through(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, path := tmp_path / "a.pth")
    with zipfile.ZipFile(path) as archive:
        program = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data/0")))
    tensor = program[program.index(b"ctorch._utils") : -2]
    pairs = b"\x80\x02ccollections\nOrderedDict\nq\x50]q\x51(]q\x52(U\x01aq\x53" + tensor + b"ee\x85q\x54Rq\x55."
    with zipfile.ZipFile(path, "w") as target:
        for name, content in (("data.pkl", pairs), ("version", b"3\n"), ("byteorder", b"little"), ("data/0", data)):
            target.writestr(f"a/{name}", content)
    assert torch.equal(checkpoint_file.read(path).tensors["a"], torch.arange(4.0))


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (b"\x80\x02R.", IndexError),
        (b"\x80\x02h\x07.", IndexError),
        (b"\x80\x02t.", IndexError),
        (b"\x80\x02", ValueError),
    ],
)
def test_a_damaged_pickle_is_told_to_be_so(tmp_path: Path, program: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        pickles.check(io.BytesIO(program), 1, 100)
    with pytest.raises(CheckpointError, match=r"damaged, or not written by torch\.save"):
        checkpoint_file.read(archived(tmp_path / "a.pth", program))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: torch.zeros(4, device="meta"), r"layer\.w has no values \(it is on the meta device\)"),
        (lambda: torch.eye(4).to_sparse(), r"layer\.w has a torch\.sparse_coo layout"),
        (lambda: torch.eye(4).to_sparse_csr(), r"layer\.w has a torch\.sparse_csr layout"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_tensors_without_values_or_that_are_not_dense_are_refused_by_name(
    tmp_path: Path, make: Any, complaint: str
) -> None:
    torch.save({"b": torch.zeros(2), "layer.w": make()}, path := tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=complaint):
        checkpoint_file.read(path)
