"""A model trained through one rendering of the plan must score the same through the other."""

from pathlib import Path

import pytest
import torch

from pipelines import datasets, loading, pretext
from pipelines.plan import View
from service import models
from service.config import ModelConfig, ObjectiveConfig
from service.training import objectives

VIEW = View(size=32)
CLASSES = 4


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    datasets.load("demo", root, "train", train_count=1200, val_count=400, size=48, classes=CLASSES)
    return root


def split(root: Path, name: str) -> loading.Source:
    manifest = datasets.load("demo", root, name, train_count=1200, val_count=400, size=48, classes=CLASSES)
    return loading.Source(manifest, VIEW, pretext.load("lorot_e" if name == "train" else "none"), seed=3)


def trained(kind: str, root: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = models.build(ModelConfig(name="resnet_small", width=16), CLASSES, 16)
    steps = 120
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    options = {"global_batch": 64, "micro_batch": 64, "rank": 0, "world_size": 1, "device": "cpu"}
    train = split(root, "train")
    with loading.open_train(
        kind, train, start_step=0, stop_step=steps, num_threads=1, prefetch=2, **options
    ) as batches:
        for batch in batches:
            optimizer.zero_grad()
            objectives.compute(model, batch, ObjectiveConfig(name="multi_task")).losses["loss"].backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def predictions(kind: str, model: torch.nn.Module, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    source = split(root, "val")
    options = {"batch_size": 50, "rank": 0, "world_size": 1, "device": "cpu", "num_threads": 1, "prefetch": 2}
    with loading.open_eval(kind, source, **options) as batches:
        pairs = [(model(batch.images).logits.argmax(1), batch.labels) for batch in batches]
    return torch.cat([guess for guess, _ in pairs]), torch.cat([label for _, label in pairs])


@pytest.mark.parametrize(("learned", "other"), [("dali", "torch"), ("torch", "dali")])
def test_a_model_trained_on_one_loader_scores_within_noise_on_the_other(learned: str, other: str, demo: Path) -> None:
    model = trained(learned, demo)
    own, labels = predictions(learned, model, demo)
    foreign, foreign_labels = predictions(other, model, demo)
    assert torch.equal(labels, foreign_labels)
    top1, foreign_top1 = (own == labels).float().mean(), (foreign == labels).float().mean()
    assert top1 > 0.5, "the model has to have learned something for the comparison to mean anything"
    # Two standard errors of the difference would be 5 points; rounding flips one prediction in a hundred.
    assert (own != foreign).float().mean() <= 0.01
    assert abs(top1 - foreign_top1) <= 0.01
