"""`lorot compare`: find, measure what is missing, and write the table after every result."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from service.comparison import course, entrants, files, table, terminal
from service.comparison.course import Outcome, Wish
from service.comparison.table import Comparison


def run(
    models: Sequence[str],
    wish: Wish,
    *,
    output: Path,
    stated: Mapping[str, Sequence[str]] = MappingProxyType({}),
    baseline: str | None = None,
    dry_run: bool = False,
    console: Console,
    say: Callable[[str], object] = lambda text: None,
) -> int:
    """Compare models, and print what came of it.

    What was measured is in the registry, so the same command goes on where it was interrupted.

    Args:
        models: addresses; `stated`: those of named groups.
        output: folder of the table and the figures.
        baseline: group that the others are paired with; default: the first one, without a pretext task if there is one.
        dry_run: only say what is there and what would run.

    Returns:
        The exit code: 0; the signal's that stopped it; that of the first entry that could not be measured.

    Raises:
        LorotError: what is wrong with the command, a configuration or a model; the folder cannot be written.
    """
    field = entrants.gather(models, stated, wish.tracking_uri)
    terminal.show_field(field, console)
    # A wrong name is told before hours of work.
    table.build(field, wish.jobs, Outcome([], []), baseline)
    say("looking at the data, and at what is there")
    entries = course.prepare(field, wish)
    terminal.show_plan(entries, console)
    if dry_run:
        return 0
    save(field, wish, output, course.collect(entries), baseline)
    outcome = course.run(entries, say, lambda so_far: save(field, wish, output, so_far, baseline))
    found = save(field, wish, output, outcome, baseline)
    terminal.show(found, console)
    console.print(f"{output / files.HTML}, {files.CSV}, {files.JSON}, {files.FIGURES}/", markup=False, highlight=False)
    if outcome.stopped:
        console.print("stopped; the same command goes on where it was", style="yellow", highlight=False)
    return outcome.exit_code


def save(field: entrants.Field, wish: Wish, output: Path, outcome: Outcome, baseline: str | None) -> Comparison:
    """The table of what there is, written to `output`."""
    found = table.build(field, wish.jobs, outcome, baseline)
    files.write(found, output)
    return found
