"""Objectives against cross-entropies written out by hand, on a model whose answers are known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.batch import Batch
from service.config import ConfigError, ModelConfig, ObjectiveConfig
from service.models import build
from service.models.heads import Outputs
from service.training import objectives

CLASSES, TURNS = 3, 4


def _batch(count: int = 4, side: int = 6, valid: list[bool] | None = None) -> Batch:
    """Boxes differ in place and side; labels are those of a 2-cell task: 4 * cell + turns."""
    generator = torch.Generator().manual_seed(5)
    turns = torch.arange(count) % 4
    cells = torch.arange(count) // 2 % 2
    return Batch(
        images=torch.randn(count, 3, side, side, generator=generator).contiguous(memory_format=torch.channels_last),
        labels=torch.arange(count) % CLASSES,
        pretext_labels=4 * cells + turns,
        boxes=torch.tensor([[i % 2, i % 3, 2 + i % 3] for i in range(count)]),
        turns=turns,
        ids=torch.arange(count),
        valid=torch.tensor(valid if valid is not None else [True] * count),
    )


class Recorder:
    """A linear model of the pixels that keeps what it was given."""

    def __init__(self, side: int = 6, num_pretext: int = 8) -> None:
        generator = torch.Generator().manual_seed(6)
        self.weight = torch.randn(3 * side * side, CLASSES, generator=generator)
        self.pretext_weight = torch.randn(3 * side * side, num_pretext, generator=generator)
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Outputs:
        self.seen.append(images)
        flat = images.flatten(1)
        return Outputs(flat @ self.weight, flat @ self.pretext_weight if self.pretext_weight.numel() else None)


def _config(name: str, **values: object) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({"name": name, **values})


def _mean_negative_log(logits: Tensor, labels: Tensor) -> float:
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    losses = [math.log(sum(math.exp(value) for value in row)) - row[label] for row, label in rows]
    return sum(losses) / len(losses)


def _turned(batch: Batch, turns: Tensor) -> Tensor:
    """The boxes' content turned, image by image with numpy."""
    images = batch.images.clone()
    for index, ((y, x, side), turn) in enumerate(zip(batch.boxes.tolist(), turns.tolist(), strict=True)):
        block = batch.images[index, :, y : y + side, x : x + side].numpy()
        images[index, :, y : y + side, x : x + side] = torch.from_numpy(np.rot90(block, turn, (1, 2)).copy())
    return images


@pytest.mark.parametrize("name", ["supervised", "augmentation"])
def test_without_a_pretext_loss_the_loss_is_the_cross_entropy(name: str) -> None:
    batch, model = _batch(), Recorder()
    result = objectives.compute(model, batch, _config(name))
    assert result.losses["class_loss"].item() == pytest.approx(
        _mean_negative_log(result.logits, batch.labels), rel=1e-5
    )
    assert torch.equal(result.losses["loss"], result.losses["class_loss"])
    assert set(result.losses) == {"loss", "class_loss"}
    assert result.pretext_logits is None
    (seen,) = model.seen
    assert torch.equal(seen, batch.images)


def test_multi_task_weighs_two_cross_entropies_of_one_forward_pass() -> None:
    batch, model = _batch(), Recorder()
    result = objectives.compute(model, batch, _config("multi_task", pretext_weight=0.3))
    (seen,) = model.seen
    assert torch.equal(seen, batch.images)
    outputs = model(batch.images)
    class_loss = _mean_negative_log(outputs.logits, batch.labels)
    pretext_loss = _mean_negative_log(outputs.pretext_logits, batch.pretext_labels)
    assert result.losses["class_loss"].item() == pytest.approx(class_loss, rel=1e-5)
    assert result.losses["pretext_loss"].item() == pytest.approx(pretext_loss, rel=1e-5)
    assert result.losses["loss"].item() == pytest.approx(class_loss + 0.3 * pretext_loss, rel=1e-5)
    assert torch.equal(result.pretext_labels, batch.pretext_labels)


def test_parallel_task_with_all_turns_forwards_each_image_at_each_turn_with_its_label() -> None:
    batch, model = _batch(), Recorder()
    result = objectives.compute(model, batch, _config("parallel_task", pretext_weight=0.5))
    (seen,) = model.seen
    assert len(seen) == 16
    assert torch.equal(seen[:4], batch.images)
    for turn in range(4):
        copies = slice(4 * turn, 4 * turn + 4)
        assert torch.equal(seen[copies], _turned(batch, torch.full((4,), turn)))
        # By hand: images 0, 1 have cell 0 and images 2, 3 cell 1.
        assert result.pretext_labels[copies].tolist() == [turn, turn, 4 + turn, 4 + turn]
    outputs = model(seen)
    class_loss = _mean_negative_log(outputs.logits[:4], batch.labels)
    pretext_loss = _mean_negative_log(outputs.pretext_logits, result.pretext_labels)
    assert result.losses["loss"].item() == pytest.approx(class_loss + 0.5 * pretext_loss, rel=1e-5)
    assert torch.equal(result.logits, outputs.logits[:4])
    assert torch.equal(result.pretext_logits, outputs.pretext_logits)


def test_parallel_task_with_one_turn_forwards_the_images_as_they_are_and_as_drawn() -> None:
    batch, model = _batch(), Recorder()
    result = objectives.compute(model, batch, _config("parallel_task", turns="one"))
    (seen,) = model.seen
    assert torch.equal(seen, torch.cat([batch.images, _turned(batch, batch.turns)]))
    outputs = model(seen)
    class_loss = _mean_negative_log(outputs.logits[:4], batch.labels)
    pretext_loss = _mean_negative_log(outputs.pretext_logits[4:], batch.pretext_labels)
    assert result.losses["loss"].item() == pytest.approx(class_loss + 0.1 * pretext_loss, rel=1e-5)
    assert torch.equal(result.pretext_logits, outputs.pretext_logits[4:])


def test_parallel_task_keeps_channels_last() -> None:
    for turns in ("all", "one"):
        model = Recorder()
        objectives.compute(model, _batch(), _config("parallel_task", turns=turns))
        assert model.seen[0].is_contiguous(memory_format=torch.channels_last)


def test_label_smoothing_is_on_the_class_loss_alone() -> None:
    batch, model = _batch(), Recorder()
    result = objectives.compute(model, batch, _config("multi_task", label_smoothing=0.2))
    outputs = model(batch.images)
    # Szegedy et al. 2016: a fifth of the target is spread evenly over all classes, the true one included.
    uniform = sum(_mean_negative_log(outputs.logits, torch.full((4,), label)) for label in range(CLASSES)) / CLASSES
    expected = 0.8 * _mean_negative_log(outputs.logits, batch.labels) + 0.2 * uniform
    assert result.losses["class_loss"].item() == pytest.approx(expected, rel=1e-5)
    pretext_loss = _mean_negative_log(outputs.pretext_logits, batch.pretext_labels)
    assert result.losses["pretext_loss"].item() == pytest.approx(pretext_loss, rel=1e-5)


EVERY = [
    ("supervised", {}),
    ("augmentation", {}),
    ("multi_task", {}),
    ("parallel_task", {"turns": "all"}),
    ("parallel_task", {"turns": "one"}),
]


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_padding_counts_nowhere(name: str, options: dict[str, str]) -> None:
    model, whole = Recorder(), _batch(4)
    padded = _batch(4)._replace(valid=torch.tensor([True, True, False, True]))
    padded.images[2] = math.nan
    kept = torch.tensor([0, 1, 3])
    short = Batch(*(tensor[kept] for tensor in whole))
    expected = objectives.compute(model, short, _config(name, **options)).losses
    got = objectives.compute(model, padded, _config(name, **options)).losses
    assert {key: value.item() for key, value in got.items()} == pytest.approx(
        {key: value.item() for key, value in expected.items()}, rel=1e-5
    )
    empty = padded._replace(valid=torch.zeros(4, dtype=torch.bool))
    assert objectives.compute(model, empty, _config(name, **options)).losses["loss"].item() == 0


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_losses_are_float32_scalars_named_in_order_even_under_autocast(name: str, options: dict[str, str]) -> None:
    model = build(ModelConfig(name="resnet_small", width=8), CLASSES, 8 if objectives.learns_pretext(name) else 0)

    def half(images: Tensor) -> Outputs:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images)

    result = objectives.compute(half, _batch(side=16), _config(name, **options))
    assert result.logits.dtype == torch.bfloat16
    assert tuple(result.losses) == objectives.loss_names(name)
    assert all(loss.dtype == torch.float32 and loss.ndim == 0 for loss in result.losses.values())
    result.losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["multi_task", "parallel_task"])
def test_a_pretext_loss_without_a_pretext_head_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' needs a pretext head"):
        objectives.compute(Recorder(num_pretext=0), _batch(), _config(name))


def test_the_registry_holds_what_the_configuration_offers() -> None:
    offered = ObjectiveConfig.model_fields["name"].annotation.__args__
    assert set(objectives.available()) == set(offered)
    assert [name for name in offered if objectives.renders_pretext(name)] == ["multi_task", "augmentation"]
    assert [name for name in offered if objectives.learns_pretext(name)] == ["multi_task", "parallel_task"]
