"""Small registered classifiers whose runs say how they were trained, for the tests of comparisons."""

import dataclasses
from pathlib import Path
from typing import Any

from small_model import CARD, written

from service import registry, tracking
from service.bundle import Card
from service.config import TrackingConfig

QUIET = TrackingConfig(system_metrics=False)
METHODS = {"none": "supervised", "lorot_i": "multi_task", "lorot_e": "multi_task", "rotation": "multi_task"}


def card(pretext: str = "none", **values: Any) -> Card:
    """The small model's card, of another method."""
    options: dict[str, Any] = {"pretext": pretext, "objective": METHODS[pretext], "pretext_options": {}}
    return dataclasses.replace(CARD, **(options | values))


def trained(folder: Path, own: Card, seed: int | None, *, weights: int, name: str = "small", **recipe: Any) -> str:
    """Register a model as its training would; returns its address.

    Args:
        seed: of the training, as its run says; None: it does not say.
        weights: another number gives other weights.
        recipe: other parameters of the run.
    """
    run = tracking.open_run(QUIET, name=name, folder=folder / f"run-{weights}")
    run.log_params({"duration": "4 epochs"} | ({} if seed is None else {"seed": seed}) | recipe)
    run.finish()
    place = written(folder / f"run-{weights}" / "model", own, seed=weights)
    version = registry.register(place, name=name, run_id=run.run_id, metric="val/top1")
    return f"models:/{name}/{version}"


def methods(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> list[str]:
    """A baseline and LoRot-E, each with these seeds."""
    found = []
    for number, pretext in enumerate(("none", "lorot_e")):
        for seed in seeds:
            top1 = 0.5 + 0.1 * number + 0.01 * seed
            own = card(pretext, metrics={"val/top1": top1, "val/top5": 0.9})
            found.append(trained(folder, own, seed, weights=10 * number + seed, name=pretext))
    return found
