"""Numbers of the table as people read them, on a terminal and on a page: in per cent, with their spread."""

from service.comparison.spread import Paired, Spread
from service.comparison.table import Block, Row


def number(found: Spread | None) -> str:
    """Mean and sample standard deviation: `93.21 ± 0.40`, of a single value `93.21`."""
    if found is None:
        return "-"
    spread = f" ± {100 * found.deviation:.2f}" if found.deviation is not None else ""
    return f"{100 * found.mean:.2f}{spread}"


def printed(value: float | None) -> str:
    """A printed number, already in per cent, with as many digits as papers give."""
    return "-" if value is None else f"{value:g}"


def size(row: Row) -> str:
    """How many values a row's numbers are of: `3 models`, `3 models, 6 runs`, `1 model, 2 seeds`."""
    count = max((len(cell.values) for cell in row.cells), default=0)
    text = f"1 model, {count} seeds" if row.over == "seeds" else f"{count} model{'' if count == 1 else 's'}"
    if row.over == "models" and row.num_runs > count:
        text += f", {row.num_runs} runs"
    return f"{text}, {row.num_missing} missing" if row.num_missing else text


def difference(found: Paired) -> str:
    """`+1.20 [-0.30, +2.70], 2 of 3 above`: mean difference in points, its 95 % interval, pairs that are above."""
    interval = (
        f" [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
        if found.low is not None and found.high is not None
        else ""
    )
    return f"{100 * found.mean:+.2f}{interval}, {found.num_above} of {len(found.seeds)} above"


def pairs(block: Block, baseline: str, titles: dict[str, str]) -> list[tuple[str, str, str]]:
    """(group, metric, difference) of all that is paired with the baseline."""
    return [
        (row.group, titles[cell.metric], difference(cell.paired))
        for row in block.rows
        if row.group != baseline
        for cell in row.cells
        if cell.paired is not None
    ]
