"""Networks with logits of a usual size, for the tests of models that travel, and their bundles."""

from pathlib import Path

import torch
from torch import nn

from pipelines.plan import View
from service import bundle, models
from service.bundle import Card
from service.config import ModelConfig

SIZE = 64
CLASSES = ("ant", "bee", "cat", "dog", "eel")


def images(count: int = 4, size: int = SIZE, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def settle(network: nn.Module, size: int = SIZE) -> nn.Module:
    """Give a random network the batch statistics of random images, and residual branches that add a little.

    Without, a deep one is nothing like a trained one: it turns rounding of the last bit into another answer.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    for block in network.modules():
        last = getattr(block, "bn3", None) or getattr(block, "bn2", None)
        if last is not None:
            last.weight.mul_(0.2)
    network.train()(images(8, size, seed=2))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return network.eval()


def written(
    folder: Path, name: str, num_pretext: int = 16, seed: int = 0, size: int = SIZE
) -> tuple[models.Classifier, Card]:
    """A settled network and the card it was written with."""
    torch.manual_seed(seed)
    config = ModelConfig.model_validate({"name": name, "width": 16})
    network = models.build(config, len(CLASSES), num_pretext)
    settle(network, size)
    card = Card(
        model=config.model_dump(mode="json"),
        classes=CLASSES,
        view=bundle.evaluation_view(View(size=size)),
        data="demo",
        data_digest="d" * 64,
        pretext="lorot_e" if num_pretext else "none",
        num_pretext=num_pretext,
        objective="multi_task",
        metrics={"val/top1": 0.5},
        run_name="job",
    )
    return network, bundle.write_bundle(folder, network.state_dict(), card)
