"""timm's own loader, without the prefetcher, which is for GPUs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.data.loaders import MEAN, STD, Job, Row

FOREIGN = True
ROWS = (Row("timm", "timm create_loader, 2 workers"),)


def batches(row: Row, folder: Path, job: Job) -> Iterator[Any]:
    import torch
    from timm.data import create_dataset, create_loader

    torch.manual_seed(job.seed)
    loader = create_loader(
        create_dataset("", str(folder / "train")),
        input_size=(3, job.size, job.size),
        batch_size=job.batch,
        is_training=True,
        use_prefetcher=False,
        no_aug=False,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        color_jitter=None,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=job.cores,
        pin_memory=False,
        use_multi_epochs_loader=True,
    )
    while True:
        for images, _ in loader:
            yield images
