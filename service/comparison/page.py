"""The page of a comparison: one HTML file that holds all it shows and loads nothing."""

from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from service.comparison import published, wording
from service.comparison.entrants import Group
from service.comparison.measurement import Result
from service.comparison.table import COLUMNS, Block, Comparison, Row


def render(found: Comparison, drawn: Sequence[tuple[Block, str, str, Markup]]) -> str:
    """The page's text; `drawn` are its figures, as `charts.draw` gives them."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("service"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("comparison.html").render(
        groups=[_group(group) for group in found.field.groups],
        baseline=found.baseline,
        blocks=[_block(found, block, drawn) for block in found.blocks],
        results=[_result(result) for result in found.outcome.results],
        missing=[(one.place.title, one.reason) for one in found.outcome.missing],
        notices=found.field.notices,
        network=published.NETWORK,
    )


def _group(group: Group) -> dict[str, Any]:
    first = group.entrants[0]
    seeds = ", ".join("unknown" if entrant.seed is None else str(entrant.seed) for entrant in group.entrants)
    return {
        "name": group.name,
        "models": ", ".join(entrant.resolved.uri for entrant in group.entrants),
        "seeds": seeds,
        "network": str(first.card.model.get("name")),
        "data": f"{first.card.data or 'unknown'} {first.card.data_digest[:12]}".strip(),
        "stated": group.is_stated,
    }


def _block(found: Comparison, block: Block, drawn: Sequence[tuple[Block, str, str, Markup]]) -> dict[str, Any]:
    titles = dict(COLUMNS[block.kind])
    beside = [metric for metric in titles if any(_printed(row, metric) is not None for row in block.rows)]
    rows = [
        {
            "group": row.group,
            "size": wording.size(row),
            "cells": [wording.number(cell.spread) for cell in row.cells],
            "printed": [wording.printed(_printed(row, metric)) for metric in beside],
        }
        for row in block.rows
    ]
    apart = None
    if block.apart is not None:
        metrics = [metric for metric in titles if any(metric in line for line in block.apart.rows.values())]
        apart = {
            "source": block.apart.source,
            "data": block.apart.data,
            "titles": [titles[metric] for metric in metrics],
            "rows": [
                (method, [wording.printed(line.get(metric)) for metric in metrics])
                for method, line in block.apart.rows.items()
            ],
            "reasons": block.apart.reasons,
        }
    return {
        "title": block.title,
        "images": block.images,
        "columns": list(titles.values()),
        "beside": [titles[metric] for metric in beside],
        "source": block.source,
        "rows": rows,
        "pairs": wording.pairs(block, found.baseline, titles),
        "charts": [(title, chart) for owner, _, title, chart in drawn if owner is block],
        "apart": apart,
    }


def _printed(row: Row, metric: str) -> float | None:
    return next(cell.published for cell in row.cells if cell.metric == metric)


def _result(result: Result) -> dict[str, str]:
    return {
        "what": result.place.title,
        "how": "was there" if result.is_reused else "measured now",
        "when": f"{result.ended:%Y-%m-%d %H:%M} UTC" if result.ended else "unknown",
        "run": result.run_id,
    }
