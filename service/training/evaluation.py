"""One pass over held-out samples, each exactly once, whatever the number of workers and the batch size."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pipelines.batch import Batch
from service.config import ObjectiveConfig
from service.models.heads import Outputs
from service.training import distributed, objectives
from service.training.distributed import World
from service.training.meters import Meters, Summary


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Outputs],
    batches: Iterable[Batch],
    num_classes: int,
    world: World,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Summary | None:
    """Top-1, top-5 and class loss over all workers' samples, and images per second.

    Every worker must call it, with a loader that gives each as many batches: with ZeRO 3 a forward pass is a common
    effort. Padding has `valid` False and counts nowhere.

    Args:
        model: in evaluation mode.
        batches: this worker's share; consumed.
        asked_to_stop: asked before every batch, by all workers alike; True gives the evaluation up, which returns None.
    """
    meters = Meters(
        num_classes,
        ("class_loss",),
        device=world.device,
        rank=world.rank,
        world_size=world.size,
        confusion=True,
    )
    config = ObjectiveConfig()
    began = time.perf_counter()
    for batch in batches:
        if asked_to_stop():
            return None
        meters.update(objectives.supervised(model, batch, config), batch.labels, batch.valid)
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    meters.record_step(time.perf_counter() - began, 0.0)
    summary = meters.collect(distributed.all_sum)
    shown = ("class_loss", "top1", "top5", "images_per_s")
    return Summary({name: summary.metrics[name] for name in shown if name in summary.metrics}, summary.confusion)
