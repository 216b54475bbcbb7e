"""This project's loader, through the entrance that training uses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.data.loaders import Job, Row

FOREIGN = False
_PREPARED = {"data": "prepared"}
ROWS = (
    Row("ours", "ours, class folders"),
    Row("ours_lorot_e", "ours, class folders, LoRot-E", options={"task": "lorot_e"}),
    Row("ours_lorot_i", "ours, class folders, LoRot-I", options={"task": "lorot_i"}),
    Row("ours_stock", "ours, class folders, the GPU's graph on the CPU (stock operators)", options={"kind": "stock"}),
    Row("ours_256", "ours, prepared, short side 256", "ours_256", _PREPARED, stored="256"),
    Row(
        "ours_256_lorot_e",
        "ours, prepared, short side 256, LoRot-E",
        "ours_256",
        _PREPARED | {"task": "lorot_e"},
        stored="256",
    ),
    Row(
        "ours_256_stock",
        "ours, prepared, short side 256, stock operators",
        "ours_256",
        _PREPARED | {"kind": "stock"},
        stored="256",
    ),
)


def batches(row: Row, folder: Path, job: Job) -> Iterator[Any]:
    from pipelines import datasets, loading, pretext
    from pipelines.plan import View

    manifest = datasets.load(row.options.get("data", "folder"), folder, "train")
    task = pretext.load(row.options.get("task", "none"))
    source = loading.Source(manifest, View(size=job.size), task, job.seed)
    with loading.open_train(
        row.options.get("kind", "dali"),
        source,
        start_step=0,
        stop_step=10**6,
        global_batch=job.batch,
        micro_batch=job.batch,
        num_threads=job.cores,
    ) as loader:
        for batch in loader:
            yield batch.images


def write(form: str, source: Path, target: Path) -> None:
    """The prepared set, as `lorot data prepare` makes it by default: short side 256."""
    from pipelines import datasets
    from pipelines.prepare import prepare

    prepare(datasets.load("folder", source, "train"), target)
