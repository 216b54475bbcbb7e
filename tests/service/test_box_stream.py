"""ImageNet's 50,000 validation images through the measuring code: what it takes does not grow with their number."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from pipelines import manifest
from pipelines.batch import Batch
from pipelines.manifest import Heading, Manifest, Rows
from pipelines.plan import View
from service.downstream import localization
from service.downstream.protocol import OFFICIAL, PAPER, Protocol
from service.downstream.scores import CAM_THRESHOLDS, CENTRE_SHARES, Tally
from service.models import Classifier

ROOT = Path(__file__).resolve().parents[2]
CLASSES = tuple(f"class {index}" for index in range(10))
VIEW = View(size=28, crop="whole")
COUNT, SHORT, BATCH = 50_000, 10_000, 250


def manifest_in(folder: Path) -> Manifest:
    """50,000 rows with one to four boxes, as ImageNet's validation set has them; no image is read here."""
    random = np.random.default_rng(0)
    counts = random.integers(1, 5, COUNT)
    low = random.uniform(0, 200, (counts.sum(), 2))
    corners = np.concatenate([low, low + random.uniform(20, 250, low.shape)], axis=1)
    rows = Rows(
        labels=random.integers(0, 10, COUNT),
        heights=np.full(COUNT, 375),
        widths=np.full(COUNT, 500),
        paths=[f"ILSVRC2012_val_{index:08d}.JPEG" for index in range(COUNT)],
        box_counts=counts,
        boxes=np.clip(corners, 0, (500, 375, 500, 375)).astype(np.float32),
    )
    manifest.write(folder / "val.arrow", Heading("folder", "val", CLASSES, CLASSES, "0" * 64, ""), rows)
    return Manifest.open(folder / "val.arrow", folder)


def small_network() -> Classifier:
    """Maps of 7 x 7 from images of 28 pixels, in microseconds."""
    torch.manual_seed(0)
    return Classifier({"pool": nn.AvgPool2d(4), "mix": nn.Conv2d(3, 8, 1), "relu": nn.ReLU()}, 8, 10, 0).eval()


def stream(data: Manifest, total: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    zeros, whole = torch.zeros(BATCH, dtype=torch.int64), torch.tensor([[0, 0, 28]]).repeat(BATCH, 1)
    valid = torch.ones(BATCH, dtype=torch.bool)
    for first in range(0, total, BATCH):
        ids = torch.arange(first, first + BATCH)
        images = torch.randn(BATCH, 3, 28, 28, generator=generator)
        labels = torch.from_numpy(data.labels[first : first + BATCH].copy())
        yield Batch(images, labels, zeros, whole, zeros, ids, valid)


def measured(data: Manifest, total: int, protocol: Protocol, look: Callable[[], int]) -> Any:
    """What `look` finds after each batch, and the result."""
    found: list[int] = []
    result = localization.measure(
        small_network(), data, VIEW, stream(data, total), total, lambda _: found.append(look()), protocol
    )
    return found, result


def report(folder: str) -> None:
    """Print, for each protocol, what a short pass held of Python's and numpy's memory, and a long one of all memory."""
    torch.set_num_threads(1)
    data, said = manifest_in(Path(folder)), {}
    for protocol, total in ((PAPER, COUNT), (OFFICIAL, SHORT)):
        # Compiled code and lazy modules come first.
        measured(data, 2 * BATCH, protocol, int)
        with pytest.MonkeyPatch.context() as patch:
            # Those come one by one until the end, and are few.
            patch.setattr(localization, "NUM_SIGHTINGS", 1)
            tracemalloc.start()
            held, _ = measured(data, SHORT, protocol, lambda: tracemalloc.get_traced_memory()[0])
            tracemalloc.stop()
        resident, result = measured(data, total, protocol, lambda: psutil.Process().memory_info().rss)
        counts = [total, result.scores.num_images, result.scores.num_located, len(result.sightings)]
        said[protocol.name] = {"held": held, "resident": resident, "counts": counts}
    print(json.dumps(said))


def test_50_000_images_take_no_more_memory_than_2_500(tmp_path: Path) -> None:
    # In a process of its own: what this one holds depends on the tests before.
    program = f"from tests.service.test_box_stream import report\nreport({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, told in json.loads(done.stdout).items():
        total, *counts = told["counts"]
        assert counts == [total, total, localization.NUM_SIGHTINGS]
        held, resident = np.array(told["held"]), np.array(told["resident"])
        # The least of many batches: at other moments some more of them are under way.
        quarter = len(held) // 4
        more = held[-quarter:].min() - held[quarter : 2 * quarter].min()
        quarter = len(resident) // 4
        grown = resident[quarter:].max() - resident[:quarter].max()
        print(f"{name}: {more:+,} bytes for {SHORT // 2:,} images more; resident {grown:+,} bytes")
        # Less than a box for each image. On a busy machine even the least is a batch or two.
        assert more < 32 * SHORT // 2
        # Pages of the manifest that were looked at count in it: a megabyte.
        assert grown < 8_000_000


def test_counts_have_one_size_however_many_images_they_hold() -> None:
    tally = Tally()
    empty = sum(value.nbytes for value in vars(tally).values() if isinstance(value, np.ndarray))
    random = np.random.default_rng(0)
    for _ in range(200):
        tally.add(
            random.random(250) < 0.7,
            random.random(250) < 0.9,
            np.ones(250, bool),
            random.random((250, len(CAM_THRESHOLDS))),
            random.random((250, len(CENTRE_SHARES))),
        )
    assert tally.num_images == COUNT
    assert sum(value.nbytes for value in vars(tally).values() if isinstance(value, np.ndarray)) == empty
