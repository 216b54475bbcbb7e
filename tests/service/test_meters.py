"""Meters against counting by hand, whatever the split into micro-batches and ranks."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.training.meters import Meters
from service.training.objectives import Losses


def _result(logits: Tensor, **losses: float) -> Losses:
    return Losses({name: torch.tensor(value) for name, value in losses.items()}, logits)


def _scores(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def test_accuracies_by_hand() -> None:
    # Labels' ranks in the four rows: 1st, 2nd, 6th, 5th.
    logits = _scores([9, 1, 2, 3, 4, 5], [1, 8, 9, 2, 3, 4], [0, 5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 1])
    labels = torch.tensor([0, 1, 0, 0])
    meters = Meters(6, ("class_loss",))
    meters.update(_result(logits, class_loss=0.5), labels, torch.ones(4, dtype=torch.bool))
    assert meters.collect().metrics == {"class_loss": 0.5, "top1": 0.25, "top5": 0.75}


def test_with_fewer_than_five_classes_top_5_is_all_of_them() -> None:
    meters = Meters(3, ())
    meters.update(_result(torch.randn(7, 3)), torch.arange(7) % 3, torch.ones(7, dtype=torch.bool))
    assert meters.collect().metrics["top5"] == 1.0


def test_losses_are_means_over_samples_not_over_micro_batches() -> None:
    meters = Meters(3, ("loss", "class_loss"))
    for count, loss in ((1, 4.0), (3, 1.0)):
        valid = torch.tensor([index < count for index in range(3)])
        meters.update(_result(torch.randn(3, 3), loss=loss, class_loss=2 * loss), torch.zeros(3).long(), valid)
    metrics = meters.collect().metrics
    assert metrics["loss"] == pytest.approx(7 / 4)
    assert metrics["class_loss"] == pytest.approx(14 / 4)


def test_padding_counts_nowhere_even_if_it_is_not_a_number() -> None:
    logits = torch.eye(3)
    logits[2] = math.nan
    meters = Meters(3, ("class_loss",), confusion=True)
    meters.update(_result(logits, class_loss=1.0), torch.tensor([0, 2, 0]), torch.tensor([True, True, False]))
    meters.update(_result(logits, class_loss=math.nan), torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.bool))
    summary = meters.collect()
    assert summary.metrics == {"class_loss": 1.0, "top1": 0.5, "top5": 1.0}
    assert summary.confusion is not None
    assert summary.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_pretext_accuracy_counts_its_own_samples() -> None:
    # Two images, each at four turns; the second is padding. Of its four copies the first image gets three right.
    pretext_logits = torch.eye(4).repeat_interleave(2, 0)
    pretext_logits[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    result = Losses(
        {"loss": torch.tensor(1.0), "class_loss": torch.tensor(1.0), "pretext_loss": torch.tensor(2.0)},
        torch.eye(2),
        pretext_logits,
        torch.arange(4).repeat_interleave(2),
        torch.tensor([True, False]).repeat(4),
    )
    meters = Meters(2, ("loss", "class_loss", "pretext_loss"))
    meters.update(result, torch.tensor([0, 1]), torch.tensor([True, False]))
    metrics = meters.collect().metrics
    assert metrics["pretext_accuracy"] == 0.75
    assert metrics["pretext_loss"] == 2.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 12), st.integers(0, 2**31), st.data())
def test_any_split_over_ranks_gives_what_one_process_counts(
    world_size: int, num_classes: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size, batches = 4, data.draw(st.integers(1, 3))
    logits = torch.randn(world_size * batches * size, num_classes, generator=generator)
    labels = torch.randint(num_classes, (len(logits),), generator=generator)
    valid = torch.rand(len(logits), generator=generator) < 0.7
    every = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    ranks = [
        Meters(num_classes, ("class_loss",), rank=rank, world_size=world_size, confusion=True)
        for rank in range(world_size)
    ]
    for index in range(world_size * batches):
        part = slice(index * size, (index + 1) * size)
        kept = every[part][valid[part]]
        mean = kept.mean().item() if len(kept) else 0.0
        ranks[index % world_size].update(_result(logits[part], class_loss=mean), labels[part], valid[part])
    flats: list[Tensor] = []
    for meters in ranks:
        meters.collect(lambda flat: flats.append(flat.clone()))
    summary = Meters(num_classes, ("class_loss",), rank=0, world_size=world_size, confusion=True).collect(
        lambda flat: flat.copy_(torch.stack(flats).sum(0))
    )
    if not valid.any():
        assert summary.metrics == {}
        return
    order = logits.argsort(1, descending=True)
    hits = (order == labels[:, None]) & valid[:, None]
    count = int(valid.sum())
    assert summary.metrics["top1"] == int(hits[:, 0].sum()) / count
    assert summary.metrics["top5"] == int(hits[:, :5].sum()) / count
    assert summary.metrics["class_loss"] == pytest.approx(every[valid].mean().item(), rel=1e-5)
    pairs = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(pairs, (labels[valid].numpy(), order[valid, 0].numpy()), 1)
    assert summary.confusion is not None
    np.testing.assert_array_equal(summary.confusion, pairs)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=60))
def test_step_time_percentiles_are_within_half_a_per_cent(times: list[float]) -> None:
    meters = Meters(2, ())
    for seconds in times:
        meters.record_step(seconds, 0.0)
    metrics = meters.collect().metrics
    for share in (50, 95):
        expected = np.percentile(times, share, method="inverted_cdf")
        assert metrics[f"step_time_p{share}_s"] == pytest.approx(expected, rel=0.0051)


def test_rates_and_shares_over_two_ranks_by_hand() -> None:
    flats: list[Tensor] = []
    for rank, (seconds, waited, memory) in enumerate(((2.0, 0.5, 7e9), (2.0, 0.1, 9e9))):
        meters = Meters(2, (), rank=rank, world_size=2)
        for _ in range(10):
            meters.update(_result(torch.zeros(8, 2)), torch.zeros(8).long(), torch.ones(8, dtype=torch.bool))
            meters.record_step(seconds, waited)
        meters.collect(lambda flat: flats.append(flat.clone()), memory_bytes=memory)
    metrics = Meters(2, (), world_size=2).collect(lambda flat: flat.copy_(flats[0] + flats[1])).metrics
    # 160 images in 20 s; 6 of 40 seconds spent waiting.
    assert metrics["images_per_s"] == pytest.approx(8.0)
    assert metrics["data_wait_share"] == pytest.approx(0.15)
    assert metrics["memory_bytes"] == 9e9


def test_collecting_starts_a_new_window() -> None:
    meters = Meters(2, ("loss",), confusion=True)
    one = torch.ones(1, dtype=torch.bool)
    meters.update(_result(torch.tensor([[1.0, 0.0]]), loss=math.nan), torch.tensor([0]), one)
    meters.record_step(1.0, 0.5)
    assert math.isnan(meters.collect(memory_bytes=5).metrics["loss"])
    assert meters.collect().metrics == {}
    meters.update(_result(torch.tensor([[1.0, 0.0]]), loss=3.0), torch.tensor([1]), one)
    summary = meters.collect()
    assert summary.metrics == {"loss": 3.0, "top1": 0.0, "top5": 1.0}
    assert summary.confusion is not None
    assert summary.confusion.tolist() == [[0, 0], [1, 0]]


def test_no_confusion_matrix_unless_asked_for_and_small_enough() -> None:
    assert Meters(200, ()).collect().confusion is None
    assert Meters(201, (), confusion=True).collect().confusion is None
    confusion = Meters(200, (), confusion=True).collect().confusion
    assert confusion is not None
    assert confusion.shape == (200, 200)


def _window(meters: Meters, seed: int, updates: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        logits = torch.randn(5, 7, generator=generator)
        loss = float(torch.rand((), generator=generator))
        meters.update(_result(logits, loss=loss), torch.arange(5), torch.rand(5, generator=generator) < 0.8)
        meters.record_step(float(torch.rand((), generator=generator)), 0.1 * float(torch.rand((), generator=generator)))


def test_a_window_that_is_saved_as_json_and_taken_up_gives_the_same_record_to_the_bit() -> None:
    whole, first, second = (Meters(7, ("loss",)) for _ in range(3))
    _window(whole, 0, 3)
    _window(whole, 1, 4)
    _window(first, 0, 3)
    _window(second, 2, 2)
    second.clear()
    second.add_state(json.loads(json.dumps(first.state())))
    # Asking changes nothing.
    assert first.state() == first.state()
    _window(second, 1, 4)
    expected, got = whole.collect(memory_bytes=3.0).metrics, second.collect(memory_bytes=3.0).metrics
    assert got.keys() == expected.keys()
    timed = ("images_per_s", "data_wait_share")
    assert {name: value for name, value in got.items() if name not in timed} == {
        name: value for name, value in expected.items() if name not in timed
    }
    for name in timed:
        assert got[name] == pytest.approx(expected[name])


def test_windows_of_two_ranks_go_on_as_one() -> None:
    alone, one, other = (Meters(7, ("loss",)) for _ in range(3))
    _window(alone, 3, 2)
    _window(alone, 4, 2)
    _window(one, 3, 2)
    _window(other, 4, 2)
    together = Meters(7, ("loss",))
    together.add_state(one.state())
    together.add_state(other.state())
    assert together.collect().metrics == pytest.approx(alone.collect().metrics)


def test_a_step_that_is_left_out_leaves_the_window_as_it_was() -> None:
    meters, expected = Meters(7, ("loss",)), Meters(7, ("loss",))
    _window(meters, 5, 2)
    _window(expected, 5, 2)
    meters.keep()
    meters.update(
        _result(torch.full((5, 7), math.nan), loss=math.nan), torch.arange(5), torch.ones(5, dtype=torch.bool)
    )
    meters.put_back()
    assert meters.collect().metrics == expected.collect().metrics
