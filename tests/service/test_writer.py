"""The copy in host memory, and the thread that writes it."""

import itertools
import threading

import pytest
import torch
from torch import Tensor

from service.errors import StorageError
from service.training.writer import HostCopy, Writer


def state(value: float = 0.0) -> dict[str, dict[str, Tensor]]:
    flat = torch.arange(12.0) + value
    return {
        "weights": {
            "conv": (torch.arange(36.0) + value).view(1, 4, 3, 3).to(memory_format=torch.channels_last),
            "first": flat[:7],
            "second": flat[7:],
            "again": flat[:7],
            "count": torch.tensor(3),
            "flag": torch.tensor([True, False, True]),
            "spread": torch.full((1, 1), value).expand(2, 3),
            "turned": (torch.arange(6.0) + value).view(2, 3).t(),
        },
        "optimizer": {},
    }


def test_the_copy_is_equal_and_stays_when_the_original_changes() -> None:
    given, expected = state(1.0), state(1.0)
    copies = HostCopy(pinned=False).take(given)
    given["weights"]["conv"].zero_()
    given["weights"]["first"].zero_()
    assert copies.keys() == expected.keys()
    for name, value in expected["weights"].items():
        assert torch.equal(copies["weights"][name], value), name
        assert copies["weights"][name].dtype == value.dtype


def test_the_memory_is_allocated_once_and_no_two_tensors_share_it() -> None:
    memory = HostCopy(pinned=False)
    first = {name: value.data_ptr() for name, value in memory.take(state(1.0))["weights"].items()}
    copies = memory.take(state(2.0))["weights"]
    assert {name: value.data_ptr() for name, value in copies.items()} == first
    expected = state(2.0)["weights"]
    assert all(torch.equal(copies[name], value) for name, value in expected.items())
    ends = sorted((value.data_ptr(), value.data_ptr() + value.nbytes) for value in copies.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert all(start % 64 == 0 for start, _ in ends)


def test_dense_tensors_keep_their_memory_format_so_that_copying_is_moving_bytes() -> None:
    copies = HostCopy(pinned=False).take(state())["weights"]
    for name in ("conv", "turned"):
        assert copies[name].stride() == state()["weights"][name].stride()
    assert copies["spread"].is_contiguous()


def test_another_set_of_tensors_is_copied_all_the_same() -> None:
    memory = HostCopy(pinned=False)
    memory.take({"weights": {"a": torch.ones(3)}, "optimizer": {}})
    copies = memory.take({"weights": {"a": torch.ones(3)}, "optimizer": {"momentum.a": torch.arange(3.0)}})
    assert copies["optimizer"]["momentum.a"].tolist() == [0, 1, 2]
    copies = memory.take({"weights": {"a": torch.zeros(2, 2)}})
    assert copies.keys() == {"weights"}
    assert copies["weights"]["a"].shape == (2, 2)


def test_an_action_runs_beside_its_caller_and_waiting_means_that_it_has_ended() -> None:
    writer, go, done = Writer(), threading.Event(), []
    writer.start(lambda: (go.wait(120), done.append(1)))
    assert writer.is_busy
    assert done == []
    go.set()
    writer.wait()
    assert done == [1]
    assert not writer.is_busy
    assert writer.took_s > 0


def test_a_failure_is_seen_at_once_and_raised_once() -> None:
    def fail() -> None:
        raise StorageError("full")

    writer = Writer()
    writer.start(fail)
    while writer.is_busy:
        pass
    assert writer.has_failed
    with pytest.raises(StorageError, match="full"):
        writer.wait()
    assert not writer.has_failed
    writer.wait()


def test_what_nobody_foresaw_is_a_failure_too() -> None:
    def fail() -> None:
        raise ZeroDivisionError("by zero")

    writer = Writer()
    writer.start(fail)
    with pytest.raises(StorageError, match="ZeroDivisionError while writing: by zero"):
        writer.wait()
