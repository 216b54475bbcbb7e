"""What a batch costs does not depend on the number of samples: a billion behave as a thousand do."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil

from pipelines import pretext
from pipelines.loading import Source, open_train
from pipelines.manifest import Heading, Manifest
from pipelines.order import Order, positions
from pipelines.plan import View, train_plan
from tests.pipelines import odd_images, sparse_manifest

ROOT = Path(__file__).parents[2]
BILLION = 10**9
BATCH = 8


def ids_at(order: Order, epoch: int, step: int) -> np.ndarray:
    """The samples of a batch somewhere in an epoch."""
    first = epoch * len(order) // BATCH + step
    return order.samples(positions(first, 0, 0, 1, BATCH, BATCH))[1]


def alone(call: str) -> None:
    """Make a call of this module's in a process of its own: what this one holds depends on the tests before."""
    program = f"from tests.pipelines import test_scale\ntest_scale.{call}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_batch_anywhere_in_any_epoch_is_planned_within_the_memory_of_a_small_set() -> None:
    alone("plan_anywhere()")


def plan_anywhere() -> None:
    for length, block in itertools.product((BILLION, 2**40), (0, 1024)):
        plan_in(length, block)


def plan_in(length: int, block: int) -> None:
    before = psutil.Process().memory_info().rss
    order, task, view = Order(3, length, block=block), pretext.load("lorot_e"), View(size=224)
    seen = []
    for epoch in (0, 7, 1000):
        for step in (0, length // BATCH // 2, length // BATCH - 1):
            where = positions(epoch * length // BATCH + step, 0, 0, 1, BATCH, BATCH)
            epochs, ids = order.samples(where)
            plan = train_plan(view, task, 3, epochs, ids, np.full(BATCH, 375), np.full(BATCH, 500))
            assert (np.abs(epochs - epoch) <= 1).all()
            assert len(set(ids.tolist())) == BATCH
            assert 0 <= ids.min() <= ids.max() < length
            assert (plan.windows[:, :2] + plan.windows[:, 2:] <= [375, 500]).all()
            seen += ids.tolist()
    assert max(seen) > 0.9 * length
    assert min(seen) < 0.1 * length
    assert len(set(seen)) == len(seen)
    assert psutil.Process().memory_info().rss - before < 50e6


def test_a_manifest_of_a_billion_samples_is_opened_and_read_without_being_loaded(tmp_path: Path) -> None:
    alone(f"read_a_billion({str(tmp_path)!r})")


def read_a_billion(folder: str) -> None:
    root = Path(folder)
    image = odd_images.encode(odd_images.PICTURE, "PNG")
    (root / "0.tar").write_bytes(b"before" + image + b"behind")
    order = Order(5, BILLION)
    row = {"label": 1, "height": odd_images.HEIGHT, "width": odd_images.WIDTH, "offset": 6, "size": len(image)}
    epoch, step = 3, 77_777
    rows = {int(sample): row for later in range(3) for sample in ids_at(order, epoch, step + later)}
    heading = Heading("huge", "train", ("a", "b"), ("a", "b"), "d", "f", shards=("0.tar",))
    sparse_manifest.write(root / "m.arrow", heading, BILLION, rows)
    assert (root / "m.arrow").stat().st_size > 40e9
    before = psutil.Process().memory_info().rss
    source = Source(Manifest.open(root / "m.arrow", root), View(size=32), pretext.load("lorot_e"), 5)
    first = epoch * BILLION // BATCH + step
    with open_train(
        "torch", source, start_step=first, stop_step=first + 3, global_batch=BATCH, micro_batch=BATCH, num_threads=1
    ) as batches:
        got = list(batches)
    assert [batch.ids.tolist() for batch in got] == [ids_at(order, epoch, step + later).tolist() for later in range(3)]
    assert all((batch.labels == 1).all() for batch in got)
    # A column alone has 8 GB.
    assert psutil.Process().memory_info().rss - before < 300e6


def test_planning_a_batch_of_any_set_needs_no_torch_and_no_table() -> None:
    program = """
import resource, sys
from pipelines.order import Order, positions
order = Order(0, 2**40)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
epochs, ids = order.samples(positions(2**45, 0, 0, 1, 256, 256))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(set(ids.tolist())), grown < 20_000, "torch" in sys.modules)
"""
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["256", "True", "False"]
