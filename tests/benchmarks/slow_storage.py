"""What slow storage costs: the rate with a latency added to every read, as a share of the rate without.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.slow_storage [--latency-ms 20] [--rounds 5]

Both loaders run in one process, in turns; the medians of the rounds are compared. Expected: 0.95 or more.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from pipelines import loading, manifest, pretext
from pipelines.files import Files, LocalFiles
from pipelines.manifest import Heading, Manifest, Rows
from pipelines.plan import View
from tests.pipelines.conftest import draw

PICTURES = 64
HEIGHT, WIDTH = 256, 340


class SlowFiles:
    """A data set's files, each read of which takes `latency_s` longer."""

    own_limit = False

    def __init__(self, files: Files, latency_s: float) -> None:
        self.files, self.latency_s = files, latency_s

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        time.sleep(self.latency_s)
        return self.files.read(path, offset, size)

    def expect(self, path: str, offset: int, size: int) -> None:
        self.files.expect(path, offset, size)


def write_shard(folder: Path, count: int) -> Manifest:
    """`count` samples in one file: different pictures, over and over."""
    pictures, offsets, sizes = [], [], []
    for number in range(PICTURES):
        draw(number, HEIGHT, WIDTH).save(folder / "picture.jpg", quality=90)
        pictures.append((folder / "picture.jpg").read_bytes())
    with (folder / "0.tar").open("wb") as shard:
        for number in range(count):
            offsets.append(shard.tell())
            sizes.append(shard.write(pictures[number % PICTURES]))
    rows = Rows(
        labels=np.zeros(count),
        heights=np.full(count, HEIGHT),
        widths=np.full(count, WIDTH),
        shards=np.zeros(count, np.int32),
        offsets=np.array(offsets),
        sizes=np.array(sizes),
    )
    heading = Heading("slow", "train", ("one",), ("one",), "0", "0", shards=("0.tar",))
    manifest.write(folder / "index.arrow", heading, rows)
    return Manifest.open(folder / "index.arrow", folder)


def measure(kind: str, opened: Manifest, batch: int, batches: int) -> tuple[float, float, loading.Loader]:
    """Images per second, and per CPU second, after the first tenth of the batches."""
    source = loading.Source(opened, View(size=224), pretext.load("lorot_e"), seed=0)
    loader = loading.open_train(
        kind, source, start_step=0, stop_step=batches, global_batch=batch, micro_batch=batch, num_threads=2
    )
    first = max(4, batches // 10)
    for number, _ in enumerate(loader):
        if number + 1 == first:
            began, cpu_began = time.perf_counter(), time.process_time()
    images = (batches - first) * batch
    return images / (time.perf_counter() - began), images / (time.process_time() - cpu_began), loader


def main() -> None:
    """Print the rates of each round and the ratio of their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loader", default="dali")
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        opened = write_shard(Path(folder), given.batch * 40)
        fast: Files = LocalFiles(folder)
        slow = SlowFiles(fast, given.latency_ms / 1000)
        rates: dict[str, list[float]] = {"fast": [], "slow": []}
        cpu_rates: dict[str, list[float]] = {"fast": [], "slow": []}
        measure(given.loader, opened, given.batch, 6)
        for number in range(given.rounds):
            for name in ("fast", "slow") if number % 2 else ("slow", "fast"):
                opened.files = fast if name == "fast" else slow
                rate, cpu_rate, loader = measure(given.loader, opened, given.batch, given.batches)
                rates[name].append(rate)
                cpu_rates[name].append(cpu_rate)
                print(
                    f"{name}: {rate:.0f} images/s, {cpu_rate:.0f} per CPU second, {loader.num_read_threads} reading "
                    f"threads, {loader.peak_read_bytes / 1e6:.1f} MB held, waited {loader.read_wait_s:.2f} s for reads"
                )
    for what, found in (("images/s", rates), ("images per CPU second", cpu_rates)):
        ratios = [slow / fast for slow, fast in zip(found["slow"], found["fast"], strict=True)]
        print(
            f"with {given.latency_ms:g} ms a read: {statistics.median(ratios):.3f} of the {what} without "
            f"(rounds: {min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
