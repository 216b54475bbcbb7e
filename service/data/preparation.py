"""`lorot data prepare`: says what became of a data set, before and after."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines import datasets
from pipelines.amounts import shown_bytes
from pipelines.prepare import Report, prepare
from pipelines.resizing import Recipe

_SKIPPED_SHOWN = 20


def run(
    console: Console,
    name: str,
    source: Path,
    destination: Path,
    splits: list[str],
    options: dict[str, Any],
    recipe: Recipe,
    *,
    shard_bytes: int,
    on_bad_image: str,
    workers: int,
    restart: bool,
) -> None:
    """Prepare splits one after the other and print a report of each; raises as `datasets.load` and `prepare`."""
    manifests = [datasets.load(name, source, split, **options) for split in splits]
    for manifest in manifests:
        report = prepare(
            manifest,
            destination,
            recipe=recipe,
            shard_bytes=shard_bytes,
            on_bad_image=on_bad_image,
            workers=workers,
            restart=restart,
        )
        show(console, report, destination)
    console.print(f"train on it with data.name=prepared data.root={destination}", markup=False, highlight=False)


def show(console: Console, report: Report, folder: Path) -> None:
    """Print what was made of one split."""
    split = report.split
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(f"prepared {report.name}", f"{split.samples:,} samples of {len(split.classes):,} classes in {folder}")
    share = split.image_bytes / split.source_bytes if split.source_bytes else 1.0
    table.add_row(
        "images", f"{shown_bytes(split.source_bytes)} before, {shown_bytes(split.image_bytes)} after ({share:.0%})"
    )
    table.add_row("shards", f"{len(split.shards)} of {shown_bytes(report.bytes_after)} with labels and manifest")
    if report.prepared:
        rate = f"{report.seconds:,.1f} s, {report.images_per_s:,.0f} images/s"
        kept = len(split.shards) - report.made
        table.add_row(
            "this run", f"{report.prepared:,} images in {rate}" + (f"; {kept} shards were there" if kept else "")
        )
    else:
        table.add_row("this run", "nothing to do: all shards were there")
    if split.skipped:
        table.add_row("left out", f"{len(split.skipped):,} unreadable images, listed in {folder / 'set.json'}")
        for where, why in split.skipped[:_SKIPPED_SHOWN]:
            table.add_row("", f"{where}: {why}")
    table.add_row("digest", split.digest)
    console.print(table, markup=False, highlight=False)


def parse_size(text: str) -> int:
    """Bytes of a text such as 256MB, 1.5 GB or 1000000; raises ValueError."""
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "b": 1}
    plain = text.strip().lower().replace(" ", "")
    unit = next((unit for unit in units if plain.endswith(unit)), "")
    number = float(plain.removesuffix(unit)) * units.get(unit, 1)
    if not 1 <= number < 10**15:
        raise ValueError(f"{text!r} is no size of a file")
    return int(number)
