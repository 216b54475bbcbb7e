"""A small network and its card, for the tests of bundles and of the registry."""

from pathlib import Path

import torch

from pipelines.plan import View
from service import bundle, models
from service.bundle import Card
from service.config import ModelConfig

MODEL = ModelConfig(name="resnet_small", width=8)
CARD = Card(
    model=MODEL.model_dump(mode="json"),
    classes=("cat", "dog", "eel"),
    view=bundle.evaluation_view(View(size=32)),
    data="demo",
    data_digest="d" * 64,
    pretext="lorot_e",
    pretext_options={"grid": 2},
    num_pretext=16,
    objective="multi_task",
    metrics={"val/top1": 0.5},
    chosen_by="val/top1",
)


def network(seed: int = 0) -> models.Classifier:
    torch.manual_seed(seed)
    return models.build(MODEL, 3, 16).eval()


def written(folder: Path, card: Card = CARD, seed: int = 0) -> Path:
    bundle.write_bundle(folder, network(seed).state_dict(), card)
    return folder
