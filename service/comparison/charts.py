"""The figures of a comparison: each block's numbers as a chart. Printed numbers are drawn only where they belong."""

from collections.abc import Iterator, Mapping

from markupsafe import Markup

from service import figures
from service.comparison.table import COLUMNS, Block, Cell, Comparison
from service.figures import Series, Strip

# What of a block is drawn as strips; all of the others is drawn as curves over their thresholds.
_STRIPS: Mapping[str, tuple[str, ...]] = {
    "classify": ("val/top1",),
    "wsol": ("max_box_acc", "top1_loc@0.5"),
    "detect": ("AP",),
    "segment": ("AP",),
}
_AXES = {"wsol-cam": "CAM threshold", "wsol-iou": "IoU threshold"}
# For a file of its own; a page has the same classes, with colours that follow light and dark.
STYLE = (
    ".label{font-size:12px;fill:#5b6572}.grid{stroke:#dfe3e8}.axis{stroke:#5b6572}.dot{fill:currentColor;fill-opacity:.75}"
    ".curve{fill:none;stroke:currentColor;stroke-width:2.2}.reference{fill:none;stroke:#1b1f24;stroke-width:1.6}"
    ".s0{color:#5b6572}.s1{color:#2458c5}.s2{color:#c2541b}.s3{color:#14795c}.s4{color:#8a3ab9}.s5{color:#b8860b}"
)


def draw(found: Comparison) -> Iterator[tuple[Block, str, str, Markup]]:
    """(block, file name without ending, title, chart) of all that can be drawn."""
    places: dict[str, int] = {}
    for block in found.blocks:
        stem = "-".join(part for part in (block.kind, block.variant) if part)
        places[stem] = places.get(stem, 0) + 1
        # The same job on other images.
        stem = f"{stem}-{places[stem]}" if places[stem] > 1 else stem
        titles = dict(COLUMNS[block.kind])
        for metric in _STRIPS.get(block.kind, ()):
            title = f"{block.title}: {titles[metric]}" if len(_STRIPS[block.kind]) > 1 else block.title
            chart = _strips(block, metric, title)
            if chart:
                yield (
                    block,
                    stem if metric == _STRIPS[block.kind][0] else f"{stem}-{metric.split('@')[0]}",
                    title,
                    chart,
                )
        if block.kind in _AXES and (chart := _curves(block)):
            yield block, stem, block.title, chart


def _strips(block: Block, metric: str, title: str) -> Markup:
    strips = []
    for row in block.rows:
        cell = next(cell for cell in row.cells if cell.metric == metric)
        if cell.spread is not None:
            values = [one.value for one in cell.values]
            printed = None if cell.published is None else cell.published / 100
            strips.append(Strip(row.group, values, cell.spread.mean, cell.spread.deviation, printed))
    return figures.strip_chart(title, strips, "published" if any(one.reference is not None for one in strips) else "")


def _curves(block: Block) -> Markup:
    series = []
    for row in block.rows:
        ours = [(_threshold(cell), cell.spread.mean) for cell in row.cells if cell.spread is not None]
        series.append(Series(row.group, ours))
    for row in block.rows:
        theirs = [(_threshold(cell), cell.published / 100) for cell in row.cells if cell.published is not None]
        if theirs:
            series.append(Series(f"{row.group}, published", theirs, is_reference=True))
    return figures.line_chart(block.title, series, _AXES[block.kind], percent=True)


def _threshold(cell: Cell) -> float:
    return float(cell.metric.rpartition("@")[2])
