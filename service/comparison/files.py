"""What a comparison leaves in its folder: comparison.json, .csv and .html, and an SVG for each figure."""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service import figures
from service.comparison import charts, page, published, table
from service.comparison.table import Block, Cell, Comparison, Row
from service.errors import StorageError

JSON, CSV, HTML, FIGURES = "comparison.json", "comparison.csv", "comparison.html", "figures"
# Numbers of ours are fractions of 1, printed ones per cent: their columns say so.
COLUMNS = (
    *("job", "protocol", "images", "group", "metric", "mean", "deviation", "values", "over", "runs", "missing"),
    *("each", "models", "run_ids", "baseline", "paired_mean", "paired_low", "paired_high", "paired_seeds"),
    *("published_percent", "published_source", "published_on_other_data_percent", "published_other_setting"),
)


def write(found: Comparison, folder: Path) -> Path:
    """Write all files, in place of earlier ones; returns the page. Raises StorageError."""
    try:
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        _replace(folder / JSON, json.dumps(table.as_json(found), indent=1, allow_nan=False) + "\n")
        _replace(folder / CSV, as_csv(found))
        drawn = list(charts.draw(found))
        for _, stem, _, chart in drawn:
            _replace(folder / FIGURES / f"{stem}.svg", figures.alone(chart, charts.STYLE))
        kept = {f"{stem}.svg" for _, stem, _, _ in drawn}
        for stale in (folder / FIGURES).glob("*.svg"):
            if stale.name not in kept:
                stale.unlink()
        _replace(folder / HTML, page.render(found, drawn))
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write the comparison ({error.strerror}); choose another place with --output"
        ) from None
    return folder / HTML


def as_csv(found: Comparison) -> str:
    """A line for each group and metric. Printed numbers of other settings have columns of their own."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for block in found.blocks:
        for row in block.rows:
            for cell in row.cells:
                writer.writerow(_line(found, block, row, cell))
        writer.writerows(_apart(block))
    return stream.getvalue()


def _line(found: Comparison, block: Block, row: Row, cell: Cell) -> dict[str, Any]:
    line: dict[str, Any] = {
        "job": block.kind,
        "protocol": block.variant,
        "images": block.images,
        "group": row.group,
        "metric": cell.metric,
        "values": len(cell.values),
        "over": row.over,
        "runs": row.num_runs,
        "missing": row.num_missing,
        "each": " ".join(repr(one.value) for one in cell.values),
        "models": "; ".join(one.model for one in cell.values),
        "run_ids": " ".join(run_id for one in cell.values for run_id in one.run_ids),
    }
    if cell.spread is not None:
        line |= {"mean": repr(cell.spread.mean)}
        line |= {"deviation": "" if cell.spread.deviation is None else repr(cell.spread.deviation)}
    if cell.paired is not None:
        pair = cell.paired
        line |= {"baseline": found.baseline, "paired_mean": repr(pair.mean)}
        line |= {"paired_low": pair.low, "paired_high": pair.high, "paired_seeds": " ".join(map(str, pair.seeds))}
    if cell.published is not None:
        line |= {"published_percent": cell.published, "published_source": block.source}
    return line


def _apart(block: Block) -> Iterator[dict[str, Any]]:
    if block.apart is None:
        return
    for method, values in block.apart.rows.items():
        for metric, value in values.items():
            yield {
                "job": block.kind,
                "protocol": block.variant,
                "metric": metric,
                "published_source": f"{block.apart.source}, {method}",
                "published_on_other_data_percent": value,
                "published_other_setting": f"{block.apart.data}, {published.NETWORK}",
            }


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
