"""torchvision in torch's DataLoader: as most people have it, and the fastest that plain torch allows."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.data.loaders import MEAN, STD, Job, Row

FOREIGN = False
ROWS = (
    Row("torchvision", "torchvision v2 + PIL DataLoader, 2 workers", options={"decoder": "pil"}),
    Row("torchvision_256", "torchvision, the same, short side 256", "files256", {"decoder": "pil"}, stored="256"),
    Row("torch_tensors", "best pure-torch path (decode_jpeg on tensors)", options={"decoder": "tensor"}),
)


def batches(row: Row, folder: Path, job: Job) -> Iterator[Any]:
    import torch
    from torch.utils.data import DataLoader
    from torchvision.transforms.v2 import functional

    on_tensors = row.options["decoder"] == "tensor"
    torch.manual_seed(job.seed)
    loader: Any = DataLoader(
        _dataset(folder, job.size, on_tensors),
        batch_size=job.batch,
        sampler=Endless(job.seed, len(list(folder.glob("train/*/*.jpg")))),
        num_workers=job.cores,
        drop_last=True,
    )
    for images, _ in loader:
        # A quarter of the bytes goes through shared memory if it is the batch that is made float.
        yield (
            functional.normalize(functional.to_dtype(images, torch.float32, scale=True), MEAN, STD, inplace=True)
            if on_tensors
            else images
        )


class Endless:
    """One random order of `count` numbers after another: no pause between epochs for anybody."""

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count

    def __iter__(self) -> Iterator[int]:
        import numpy as np

        rng = np.random.default_rng(self.seed)
        while True:
            yield from rng.permutation(self.count).tolist()


def transform(size: int, on_tensors: bool = False) -> Callable[[Any], Any]:
    """The augmentation: PIL image -> normalised float32; or uint8 tensor -> uint8 tensor."""
    import torch
    from torchvision.transforms import v2

    steps: list[Any] = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    if not on_tensors:
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose(steps)


def _dataset(folder: Path, size: int, on_tensors: bool) -> Any:
    from torchvision.datasets import ImageFolder
    from torchvision.io import decode_jpeg, read_file

    if not on_tensors:
        return ImageFolder(str(folder / "train"), transform(size))
    return ImageFolder(
        str(folder / "train"), transform(size, on_tensors=True), loader=lambda path: decode_jpeg(read_file(path))
    )
