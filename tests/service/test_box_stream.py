"""ImageNet's 50,000 validation images through the measuring code: what it takes does not grow with their number."""

import gc
import tracemalloc
from collections.abc import Iterator

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

CLASSES = tuple(f"class {index}" for index in range(10))
VIEW = View(size=28, crop="whole")
COUNT, BATCH = 50_000, 250


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
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
    folder = tmp_path_factory.mktemp("stream")
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


def peak_bytes(data: Manifest, total: int, protocol: Protocol) -> tuple[int, list[int], localization.Measured]:
    """The most bytes that Python and numpy held, resident bytes batch by batch, and the result."""
    resident: list[int] = []
    gc.collect()
    tracemalloc.start()
    try:
        result = localization.measure(
            small_network(),
            data,
            VIEW,
            stream(data, total),
            total,
            lambda _: resident.append(psutil.Process().memory_info().rss),
            protocol,
        )
        return tracemalloc.get_traced_memory()[1], resident, result
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("protocol", "total"), [(PAPER, COUNT), (OFFICIAL, 10_000)], ids=["paper", "official"])
def test_50_000_images_take_no_more_memory_than_2_500(data: Manifest, protocol: Protocol, total: int) -> None:
    torch.set_num_threads(1)
    # Compiled code and lazy modules come first.
    peak_bytes(data, 2 * BATCH, protocol)
    few, _, _ = peak_bytes(data, 2_500, protocol)
    many, resident, result = peak_bytes(data, total, protocol)
    assert result.scores.num_images == result.scores.num_located == total
    assert len(result.sightings) == localization.NUM_SIGHTINGS
    quarter = len(resident) // 4
    grown = max(resident[quarter:]) - max(resident[:quarter])
    print(f"{protocol.name}: at most {few:,} bytes for 2,500, {many:,} for {total:,}; resident {grown:+,} bytes")
    assert many < few + 200_000
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
