"""Lightning's litdata: chunks of encoded images, streamed from disk, with torchvision's transforms."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.data.loaders import MEAN, STD, Job, Row, files
from tests.benchmarks.data.loaders.vision import transform

FOREIGN = True
ROWS = (Row("litdata", "litdata + torchvision, 2 workers", "litdata"),)


def batches(row: Row, folder: Path, job: Job) -> Iterator[Any]:
    import torch
    from litdata import StreamingDataLoader, StreamingDataset
    from torchvision.transforms.v2 import functional

    augment = transform(job.size, on_tensors=True)

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            # litdata decodes with torchvision's decode_jpeg by itself.
            return augment(super().__getitem__(index)["image"])

    loader = StreamingDataLoader(
        Images(str(folder), shuffle=True, seed=job.seed, drop_last=True),
        batch_size=job.batch,
        num_workers=job.cores,
        persistent_workers=True,
        drop_last=True,
    )
    while True:
        for images in loader:
            yield functional.normalize(functional.to_dtype(images, torch.float32, scale=True), MEAN, STD, inplace=True)


def write(form: str, source: Path, target: Path) -> None:
    """Chunks of the files as they are, a few times over: an epoch's end is a pause that larger sets do not have."""
    from litdata import optimize

    inputs = [str(path) for path in files(source)] * 6
    optimize(fn=_sample, inputs=inputs, output_dir=str(target), chunk_bytes="32MB", num_workers=1)


def _sample(path: str) -> dict[str, Any]:
    from PIL import Image

    return {"image": Image.open(path)}
