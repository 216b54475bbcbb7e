"""How fast `lorot data prepare` is, as a share of what decoding and encoding alone would take on all cores.

    python -m tests.benchmarks.prepare_rate --images 1500 --rounds 5

Both are measured in turn, several times in one run, on the same images: 500 x 375 pixels in, short side 256 out. The
limit decodes each file and encodes a picture of the prepared size, in as many processes, and does nothing else: no
resizing, checks, checksums, shards. Starting up is left out of both: of preparing, by subtracting a run of few images.
Rates per second of processor time are steadier than those per second on a machine that does other things too.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines import datasets
from pipelines.prepare import prepare
from pipelines.resizing import Recipe

BAR = 0.8
HEIGHT, WIDTH = 375, 500
# Enough to start all processes and load all code.
FEW = 128


def draw(number: int) -> Image.Image:
    """A picture that takes about as many bytes as a photograph of its size."""
    generator = np.random.default_rng(number)
    layers = [
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(
            (WIDTH, HEIGHT), Image.BICUBIC
        )
        for side in (4, 12, 40, 130)
    ]
    weights = (0.5, 0.25, 0.15, 0.1)
    mixed = sum(weight * np.asarray(layer, np.float32) for weight, layer in zip(weights, layers, strict=True))
    noise = generator.normal(0, 3, (HEIGHT, WIDTH, 1))
    return Image.fromarray((mixed + noise).clip(0, 255).astype(np.uint8))


def write_images(root: Path, count: int) -> None:
    """Fill root/train and root/few; one drawing for each of 64 names, since only the decoder's work matters."""
    drawn = []
    for number in range(64):
        file = io.BytesIO()
        draw(number).save(file, "JPEG", quality=92)
        drawn.append(file.getvalue())
    for split, images in (("train", count), ("few", FEW)):
        (root / split / "one").mkdir(parents=True)
        for number in range(images):
            (root / split / "one" / f"{number:06d}.jpg").write_bytes(drawn[number % len(drawn)])


def decode_and_encode(folder: Path, first: int, step: int) -> None:
    """Print wall and processor seconds of decoding every `step`-th file and encoding as many prepared pictures."""
    files = sorted(folder.rglob("*.jpg"))[first::step]
    height, width = Recipe().fitted(HEIGHT, WIDTH)
    pictures = [Image.open(file).resize((width, height), Image.Resampling.BILINEAR) for file in files[:64]]
    print("ready", flush=True)
    sys.stdin.readline()
    began, busy = time.monotonic(), time.process_time()
    for number, file in enumerate(files):
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            image.load()
        pictures[number % len(pictures)].save(io.BytesIO(), "JPEG", quality=Recipe().quality)
    print(json.dumps([time.monotonic() - began, time.process_time() - busy]))


def measure_limit(folder: Path, workers: int) -> tuple[float, float]:
    """Wall seconds of the slowest process, and processor seconds of all."""
    line = [sys.executable, "-m", "tests.benchmarks.prepare_rate", "--limit-of", str(folder), str(workers)]
    running = [
        subprocess.Popen([*line, str(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for first in range(workers)
    ]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    seconds = [json.loads(process.communicate()[0]) for process in running]
    return max(wall for wall, _ in seconds), sum(busy for _, busy in seconds)


def measure_prepare(root: Path, split: str, workers: int) -> tuple[float, float]:
    """Wall and processor seconds of preparing a split, processes included."""
    source = datasets.load("folder", root, split)
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        began, busy = time.monotonic(), processor_seconds()
        prepare(source, Path(folder), workers=workers)
        return time.monotonic() - began, processor_seconds() - busy


def processor_seconds() -> float:
    """Of this process and of those it started and saw the end of."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit-of", nargs=3, metavar=("FOLDER", "WORKERS", "FIRST"))
    arguments = parser.parse_args()
    if arguments.limit_of:
        folder, step, first = arguments.limit_of
        decode_and_encode(Path(folder), int(first), int(step))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "source"
        write_images(root, arguments.images)
        size = statistics.mean(file.stat().st_size for file in (root / "few").rglob("*.jpg"))
        print(f"{arguments.images} JPEG files of {WIDTH} x {HEIGHT}, {size:,.0f} bytes, {arguments.workers} processes")
        measure_prepare(root, "few", arguments.workers)
        rows = []
        for number in range(arguments.rounds):
            limit = measure_limit(root / "train", arguments.workers)
            start = measure_prepare(root, "few", arguments.workers)
            whole = measure_prepare(root, "train", arguments.workers)
            limit_rates = [arguments.images / seconds for seconds in limit]
            rates = [(arguments.images - FEW) / (after - before) for before, after in zip(start, whole, strict=True)]
            rows.append((*limit_rates, *rates))
            print(
                f"round {number + 1}: limit {limit_rates[0]:,.0f} images/s, {limit_rates[1]:,.0f} per CPU second; "
                f"prepare {rates[0]:,.0f}, {rates[1]:,.0f}; "
                f"ratio {rates[0] / limit_rates[0]:.2f}, {rates[1] / limit_rates[1]:.2f}"
            )
        wall = statistics.median(row[2] / row[0] for row in rows)
        busy = statistics.median(row[3] / row[1] for row in rows)
        print(
            f"medians of paired ratios: {wall:.2f} by the clock, {busy:.2f} by processor time; at least {BAR} is wanted"
        )
        sys.exit(busy < BAR)


if __name__ == "__main__":
    main()
