"""The rate of a localization against the plain inference of the same network, interleaved in one process.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.wsol_rate [--rounds 9]

Plain inference asks the network for its five likeliest classes. A localization asks for these, for the class activation
maps, for a box at each of 19 thresholds and for its IoU with the true boxes, and keeps a dozen pictures. Both pass over
the same batches, which lie in memory, with random weights: ResNet-50 at 224 pixels, and the small network at 64, whose
inference is a hundred times as cheap. The ratio of the rates is taken within a round; its median is the figure, in wall
time and in CPU time of all threads, which is steadier on a shared machine and what a localization costs in work.

Boxes are found on a thread. "one core" confines the whole process to one, where the thread takes its time from the
network. "beside" gives it a second core, as a network on a GPU leaves it.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from pipelines import manifest
from pipelines.batch import Batch
from pipelines.manifest import Heading, Manifest, Rows
from pipelines.plan import View
from service import models
from service.config import ModelConfig
from service.downstream import localization
from service.downstream.protocol import PROTOCOLS, Protocol
from service.models import Classifier

NUM_CLASSES = 1000


def data_set(folder: Path, count: int) -> Manifest:
    """A manifest of images as large as ImageNet's usual ones, one to three boxes each; there are no image files."""
    random = np.random.default_rng(0)
    counts = random.integers(1, 4, count)
    low = random.uniform(0, 200, (counts.sum(), 2))
    corners = np.concatenate([low, low + random.uniform(20, 300, low.shape)], axis=1)
    names = tuple(f"class {index}" for index in range(NUM_CLASSES))
    rows = Rows(
        labels=random.integers(0, NUM_CLASSES, count),
        heights=np.full(count, 375),
        widths=np.full(count, 500),
        paths=[f"{index:08d}.JPEG" for index in range(count)],
        box_counts=counts,
        boxes=np.clip(corners, 0, (500, 375, 500, 375)).astype(np.float32),
    )
    manifest.write(folder / "val.arrow", Heading("folder", "val", names, names, "0" * 64, ""), rows)
    return Manifest.open(folder / "val.arrow", folder)


def batches(data: Manifest, size: int, batch_size: int) -> list[Batch]:
    """All of the data set, as normalised noise."""
    generator = torch.Generator().manual_seed(0)
    zeros, whole = torch.zeros(batch_size, dtype=torch.int64), torch.tensor([[0, 0, size]]).repeat(batch_size, 1)
    found = []
    for first in range(0, len(data), batch_size):
        images = torch.randn(batch_size, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
        ids = torch.arange(first, first + batch_size)
        labels = torch.from_numpy(data.labels[first : first + batch_size].copy())
        found.append(Batch(images, labels, zeros, whole, zeros, ids, torch.ones(batch_size, dtype=torch.bool)))
    return found


@contextlib.contextmanager
def confined(to_one_core: bool) -> Iterator[None]:
    """This thread, and those it starts, on one core only."""
    before = os.sched_getaffinity(0)
    try:
        if to_one_core:
            os.sched_setaffinity(0, {min(before)})
        yield
    finally:
        os.sched_setaffinity(0, before)


def seconds(task: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds that a task takes."""
    start, cpu_start = time.perf_counter(), time.process_time()
    task()
    return time.perf_counter() - start, time.process_time() - cpu_start


@torch.inference_mode()
def infer(model: Classifier, given: list[Batch]) -> None:
    for batch in given:
        model(batch.images).logits.topk(5).indices.cpu().numpy()


def compare(name: str, size: int, batch_size: int, count: int, protocol: Protocol, rounds: int, one_core: bool) -> None:
    torch.manual_seed(0)
    model = models.build(ModelConfig(name=name), NUM_CLASSES, 0).eval().to(memory_format=torch.channels_last)
    view = View(size=size)
    with tempfile.TemporaryDirectory() as folder, confined(one_core):
        data = data_set(Path(folder), count)
        given = batches(data, size, batch_size)

        def localize() -> None:
            localization.measure(model, data, view, given, count, protocol=protocol)

        localize()
        ratios, plain_rates = [], []
        for index in range(rounds):
            tasks = {"plain": lambda: infer(model, given), "boxes": localize}
            # Whoever goes second finds warmer caches: they take turns.
            took = {key: seconds(tasks[key]) for key in list(tasks)[:: 1 if index % 2 else -1]}
            ratios.append([plain / boxes for plain, boxes in zip(took["plain"], took["boxes"], strict=True)])
            plain_rates.append(count / took["plain"][0])
    print(
        f"{name}, {size} px, batch {batch_size}, {protocol.name}, {'one core' if one_core else 'beside'}: "
        f"plain {statistics.median(plain_rates):.1f} images/s; the rate of a localization, of plain inference:"
    )
    for clock, values in zip(("wall", "CPU"), zip(*ratios, strict=True), strict=True):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {clock} time: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["resnet50", "resnet_small"])
    parser.add_argument("--images", type=int, nargs=2, default=(32, 4096), help="of a pass, by each network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for one_core in (True, False):
        for protocol in PROTOCOLS.values():
            for name, size, batch_size, count in (
                ("resnet50", 224, 8, arguments.images[0]),
                ("resnet_small", 64, 64, arguments.images[1]),
            ):
                if arguments.only in (None, name):
                    compare(name, size, batch_size, count, protocol, arguments.rounds, one_core)


if __name__ == "__main__":
    main()
