"""What a data set's size costs: indexing it, opening it, sharing it between workers, and the first batch of any step.

    python -m tests.benchmarks.scale [--files 200000] [--folder FOLDER]

The files are hard links to 500 JPEGs of 500 x 375 pixels, so that a million of them need one disk block each at most;
they are read from a warm cache. The billion samples are a real manifest whose columns are holes in a sparse file.
"""

import argparse
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pipelines import datasets, listing, manifest, pretext
from pipelines.loading import Source, open_train
from pipelines.manifest import Heading, Manifest, Rows
from pipelines.order import Order, positions
from pipelines.plan import View, train_plan
from tests.benchmarks import photographs
from tests.pipelines import sparse_manifest

ORIGINALS = 500
MOST_LINKS = 60_000
BATCH = 64
IMAGENET = 1_281_167


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="where to put them; default: a temporary folder")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        measure_folder(place / "folder", given.files)
        measure_opening(place)
        measure_billion(place)
    finally:
        shutil.rmtree(place)


def measure_folder(root: Path, count: int) -> None:
    """Listing, header reading and opening of a folder of `count` files in 1,000 classes."""
    originals = photographs.write(root / "originals", max(ORIGINALS, -(-count // MOST_LINKS)))
    paths = []
    for number in range(count):
        folder = f"train/n{number * 1000 // count:08d}"
        if number % max(1, count // 1000) == 0:
            (root / folder).mkdir(parents=True, exist_ok=True)
        paths.append(f"{folder}/n{number:012d}.JPEG")
        (root / paths[-1]).parent.mkdir(exist_ok=True)
        (root / paths[-1]).hardlink_to(originals[number % len(originals)])
    with timed() as spent:
        listing.files(root, "train", (".jpeg",))
    report(f"listing of {count:,} files", spent, f"{count / spent():,.0f} files/s")
    sample = paths[: min(count, 50_000)]
    with timed() as spent:
        listing.read_headers(root, sample)
    report(
        f"headers of {len(sample):,} files, {listing.READERS} threads", spent, f"{len(sample) / spent():,.0f} headers/s"
    )
    with timed() as spent:
        datasets.load("folder", root, "train")
    report(f"first load of {count:,} files", spent, f"{count / spent():,.0f} files/s")
    with timed() as spent:
        found = datasets.load("folder", root, "train")
    report("second load: the files are looked at", spent)
    with timed() as spent:
        Manifest.open(found.path, root)
    report("opening: they are not", spent)


def measure_opening(place: Path) -> None:
    """Opening a manifest of ImageNet's length, and the memory of workers that have touched all of it."""
    generator = np.random.default_rng(0)
    paths = [f"ILSVRC/Data/CLS-LOC/train/n{n % 1000:08d}/n{n % 1000:08d}_{n:06d}.JPEG" for n in range(IMAGENET)]
    sizes = generator.integers(300, 600, (2, IMAGENET))
    names = tuple(f"n{number:08d}" for number in range(1000))
    path = place / "imagenet.arrow"
    manifest.write(path, Heading("x", "train", names, names, "d", "f"), Rows(np.arange(IMAGENET) % 1000, *sizes, paths))
    times = []
    for _ in range(5):
        with timed() as spent:
            Manifest.open(path, place)
        times.append(spent())
    size = path.stat().st_size
    print(
        f"{'opening a manifest of 1,281,167 files':48} {np.median(times) * 1e3:9.2f} ms   {size / 1e6:.0f} MB on disk"
    )
    context = multiprocessing.get_context("spawn")
    # Both at once, else there is nobody to share with.
    meeting, answers = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_touch, args=(path, place, meeting, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    shares = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    for number, (rss, pss) in enumerate(shares):
        what = f"  worker {number}, all columns and paths touched"
        print(f"{what:48} {rss / 1e6:9.1f} MB more RSS, {pss / 1e6:.1f} MB PSS")


def _touch(path: Path, root: Path, meeting: Any, answers: Any) -> None:
    before = psutil.Process().memory_full_info()
    opened = Manifest.open(path, root)
    opened.labels.sum(), opened.heights.sum(), opened.widths.sum()
    for sample in range(0, len(opened), 20):
        opened.location(sample)
    meeting.wait()
    after = psutil.Process().memory_full_info()
    meeting.wait()
    answers.put((after.rss - before.rss, after.pss - before.pss))


def measure_billion(place: Path) -> None:
    """The first batch of steps all over the training on a billion samples."""
    image = photographs.encode(0)
    (place / "0.tar").write_bytes(image)
    order, count, task = Order(5, 10**9), 10**9, pretext.load("lorot_e")
    row = {"label": 1, "height": photographs.HEIGHT, "width": photographs.WIDTH, "size": len(image)}
    steps = [epoch * count // BATCH + step for epoch, step in ((0, 0), (3, 10**6), (89, count // BATCH - 1))]
    ids = {step: order.samples(positions(step, 0, 0, 1, BATCH, BATCH))[1] for step in steps}
    heading = Heading("huge", "train", ("a", "b"), ("a", "b"), "d", "f", shards=("0.tar",))
    path = place / "billion.arrow"
    sparse_manifest.write(path, heading, count, {int(sample): row for own in ids.values() for sample in own})
    with timed() as spent:
        opened = Manifest.open(path, place)
    about = path.stat()
    report(
        "opening a manifest of a billion",
        spent,
        f"{about.st_size / 1e9:.0f} GB, {about.st_blocks / 2e3:.1f} MB on disk",
    )
    view = View(size=224)
    for kind in ("torch", "dali", "dali"):
        for step in steps:
            before = psutil.Process().memory_info().rss
            with timed() as planned:
                epochs, own = order.samples(positions(step, 0, 0, 1, BATCH, BATCH))
                train_plan(view, task, 5, epochs, own, opened.heights[own], opened.widths[own])
            source = Source(opened, view, task, 5)
            schedule: dict[str, Any] = {"start_step": step, "stop_step": step + 1}
            with (
                timed() as spent,
                open_train(kind, source, **schedule, global_batch=BATCH, micro_batch=BATCH) as batches,
            ):
                (batch,) = batches
            assert batch.ids.tolist() == ids[step].tolist()
            more = (psutil.Process().memory_info().rss - before) / 1e6
            report(f"  step {step:,}, {kind}", spent, f"planning {planned() * 1e3:.1f} ms, RSS {more:+.0f} MB")


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yields a function that tells, after the block, how many seconds it took."""
    start = time.perf_counter()
    end: list[float] = []
    try:
        yield lambda: end[0] - start
    finally:
        end.append(time.perf_counter())


def report(what: str, spent: Callable[[], float], more: str = "") -> None:
    print(f"{what:48} {spent():9.3f} s    {more}", flush=True)


if __name__ == "__main__":
    main()
