"""webdataset's tar shards with torchvision's transforms."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.data.loaders import Job, Row, files
from tests.benchmarks.data.loaders.vision import transform

FOREIGN = True
_SHARDS = 8
ROWS = (Row("webdataset", "webdataset + torchvision, 2 workers", "webdataset"),)


def batches(row: Row, folder: Path, job: Job) -> Iterator[Any]:
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False, seed=job.seed)
        .shuffle(500)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform(job.size), int)
        .batched(job.batch, partial=False)
    )
    for images, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=job.cores):
        yield images


def write(form: str, source: Path, target: Path) -> None:
    """Shards of the files as they are."""
    classes = sorted(path.name for path in (source / "train").iterdir())
    images = files(source)
    for number in range(_SHARDS):
        with tarfile.open(target / f"{number:04}.tar", "w") as shard:
            for index in range(number, len(images), _SHARDS):
                label = target / "label"
                label.write_text(str(classes.index(images[index].parent.name)))
                shard.add(images[index], f"{index:06}.jpg")
                shard.add(label, f"{index:06}.cls")
                label.unlink()
