"""A comparison on a terminal: what there is and what would run, and the table."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from service.comparison import published, wording
from service.comparison.course import Entry, minutes
from service.comparison.entrants import Field
from service.comparison.measurement import time_of
from service.comparison.table import COLUMNS, Block, Comparison


def show_field(field: Field, console: Console) -> None:
    """Print the groups, and what is to be known of them."""
    for group in field.groups:
        models = ", ".join(
            f"{entrant.title} (seed {'unknown' if entrant.seed is None else entrant.seed})"
            for entrant in group.entrants
        )
        console.print(f"{group.name}: {models}", markup=False, highlight=False)
    for notice in field.notices:
        console.print(f"note: {notice}", style="yellow", markup=False, highlight=False)


def show_plan(entries: Sequence[Entry], console: Console) -> None:
    """Print every entry: there already, to be measured with an estimate, or impossible."""
    table = Table.grid(padding=(0, 2))
    for column in ("", "", ""):
        table.add_column(column, overflow="fold")
    total, unknown = 0.0, 0
    for entry in entries:
        if entry.problem is not None:
            table.add_row("impossible", entry.place.title, entry.problem.reason)
        elif entry.earlier is not None:
            ended = time_of(entry.earlier.ended_ms)
            when = f", {ended:%Y-%m-%d %H:%M} UTC" if ended else ""
            table.add_row("is there", entry.place.title, f"run {entry.earlier.run_id}{when}")
        else:
            assert entry.measurement is not None, "it is neither impossible nor there"
            expected = entry.measurement.expected_s()
            total, unknown = total + (expected or 0.0), unknown + (expected is None)
            text = (
                f"about {minutes(expected)}" if expected is not None else "nothing like it is recorded to tell how long"
            )
            table.add_row("to do", entry.place.title, f"{entry.measurement.work}; {text}")
    console.print(table, markup=False, highlight=False)
    todo = sum(entry.earlier is None and entry.problem is None for entry in entries)
    there = sum(entry.earlier is not None for entry in entries)
    known = f", about {minutes(total)}" if total else ""
    more = f", besides {unknown} of unknown length" if unknown and total else ""
    console.print(f"{there} of {len(entries)} results are there, {todo} to be measured{known}{more}", highlight=False)


def show(found: Comparison, console: Console) -> None:
    """Print the table: ours, what is printed of the same setting in columns of its own, and the rest apart."""
    for block in found.blocks:
        _show_block(block, found.baseline, console)
    reused = sum(result.is_reused for result in found.outcome.results)
    measured = len(found.outcome.results) - reused
    console.print(f"{reused} results were there, {measured} were measured", highlight=False)
    for one in found.outcome.missing:
        console.print(f"missing: {one.place.title}: {one.reason}", style="red", markup=False, highlight=False)


def _show_block(block: Block, baseline: str, console: Console) -> None:
    """A line for each metric, which is narrower than a line for each group."""
    titles = dict(COLUMNS[block.kind])
    beside = [row for row in block.rows if any(cell.published is not None for cell in row.cells)]
    caption = f"published: {block.source}" if beside else None
    table = Table(title=f"{block.title}, per cent", title_justify="left", title_style="bold", caption=caption)
    table.add_column("")
    for row in block.rows:
        table.add_column(row.group, justify="right")
    for row in beside:
        table.add_column(f"published {row.group}", justify="right", style="italic")
    table.add_row("", *(wording.size(row) for row in block.rows), *("" for _ in beside))
    for number, title in enumerate(titles.values()):
        ours = [wording.number(row.cells[number].spread) for row in block.rows]
        printed = [wording.printed(row.cells[number].published) for row in beside]
        table.add_row(title, *ours, *printed)
    if block.rows:
        console.print(table)
    if block.images:
        console.print(f"on {block.images}", style="dim", markup=False, highlight=False)
    for group, metric, text in wording.pairs(block, baseline, titles):
        console.print(f"{group} against {baseline}, {metric}: {text}", markup=False, highlight=False)
    if block.apart is not None:
        rows = [
            f"{method} {', '.join(f'{titles[metric]} {value:g}' for metric, value in line.items())}"
            for method, line in block.apart.rows.items()
        ]
        where = f"{block.apart.data}, {published.NETWORK}; not comparable: {'; '.join(block.apart.reasons)}"
        text = f"published, on other data ({block.apart.source}; {where}): {' / '.join(rows)}"
        console.print(text, style="dim", markup=False, highlight=False)
    console.print()
