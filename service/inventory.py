"""What there is: registered models, and what a data set holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipelines import datasets
from service import config_file, registry

_CLASSES_SHOWN = 20


def show_models(console: Console, tracking_uri: str | None = None) -> None:
    """Print every registered version: aliases, metrics, lineage, and what downstream jobs found out."""
    rows = registry.list_models(tracking_uri)
    if not rows:
        console.print("no models are registered here yet; `lorot quickstart` or `lorot train CONFIG` registers one")
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for number, row in enumerate(rows):
        if number:
            table.add_row()
        table.add_row(f"{row.name}/{row.version}", f"{row.created:%Y-%m-%d %H:%M} UTC  {', '.join(row.aliases)}")
        table.add_row("  trained on", f"{row.data}, {row.objective}, pretext {row.pretext}")
        table.add_row("  by run", f"{row.run_name} {row.run_id}")
        table.add_row("  metrics", _numbers(row.metrics))
        if row.downstream:
            table.add_row("  downstream", _numbers(row.downstream))
    console.print(table, markup=False, highlight=False)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as a mapping, the values read as YAML; raises ConfigError."""
    values: dict[str, Any] = {}
    for option in options:
        config_file.assign(values, option)
    return values


def show_data(console: Console, name: str, root: Path, split: str, options: Sequence[str] = ()) -> None:
    """Print what a split holds; raises ConfigError or DataError as loading does."""
    manifest = datasets.load(name, root, split, **parse_options(options))
    labels, what = manifest.labels, "samples"
    if manifest.instances is not None:
        labels, what = manifest.instances.labels, "objects"
    counts = np.bincount(labels, minlength=len(manifest.classes))
    known = manifest.heights > 0
    sizes = [column[known] for column in (manifest.heights, manifest.widths)]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(f"{name} {split}", f"{len(manifest):,} samples in {root}")
    if known.any():
        height, width = (f"{column.min()} to {column.max()}" for column in sizes)
        table.add_row("pixels", f"height {height}, width {width}")
    if not known.all():
        table.add_row("unreadable", f"{np.count_nonzero(~known):,} headers")
    table.add_row("boxes", "yes" if manifest.has_boxes else "no")
    if manifest.instances is not None:
        masks = "masks" if manifest.instances.has_segmentations else "no masks"
        learnable = manifest.heading.num_trainable
        table.add_row("objects", f"{len(manifest.instances):,}, with {masks}; {learnable:,} images to learn from")
    for remark, number in manifest.heading.remarks.items():
        table.add_row("annotations", f"{number:,} {remark}")
    table.add_row("classes", f"{len(manifest.classes)}, of {counts.min():,} to {counts.max():,} {what}")
    for label, count in list(zip(manifest.classes, counts, strict=True))[:_CLASSES_SHOWN]:
        table.add_row("", f"{count:,} {label}")
    if len(manifest.classes) > _CLASSES_SHOWN:
        table.add_row("", f"and {len(manifest.classes) - _CLASSES_SHOWN} more")
    table.add_row("digest", manifest.digest)
    console.print(table, markup=False, highlight=False)


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in sorted(values.items()))
