"""A localization's result for a terminal."""

from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from service.downstream.wsol import Result

_ROW_TITLES = {
    "top1_loc": "top-1 localization",
    "top5_loc": "top-5 localization",
    "gt_known": "GT-known localization",
    "centre_top1_loc": "centre box, top-1",
    "centre_gt_known": "centre box, GT-known",
}


def render(result: "Result") -> Group:
    """The result for a terminal: `rich.print(render(result))`. Numbers in per cent."""
    scores = result.scores
    version = f" version {result.version}" if result.version is not None else ""
    head = Text.assemble(
        (f"{result.model}{version}", "bold"),
        f" on {result.data}/{result.split}: {scores.num_images:,} images, "
        f"top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}",
    )
    parts: list[Any] = [head]
    for reading in result.readings():
        table = Table(title=f"axis={reading['axis']}: {reading['title']}", title_justify="left", title_style="")
        table.add_column("per cent")
        for threshold in reading["thresholds"]:
            table.add_column(f"{threshold:g}", justify="right")
        for name, values in reading["rows"].items():
            style = "dim" if name.startswith("centre") else ""
            table.add_row(_ROW_TITLES[name], *(f"{100 * value:.2f}" for value in values), style=style)
        parts.append(table)
    summary = Table.grid(padding=(0, 2))
    cut, side = f"{scores.best_cam_threshold:g}", f"{scores.centre_share:.0%}"
    summary.add_row("MaxBoxAcc", f"{scores.max_box_acc:.2%}", f"GT-known at IoU 0.5 and the best CAM threshold, {cut}")
    summary.add_row("MaxBoxAccV2", f"{scores.max_box_acc_v2:.2%}", "mean of the best at IoU 0.3, 0.5 and 0.7")
    summary.add_row(
        "centre box", f"{scores.centre_box_acc:.2%}", f"GT-known at IoU 0.5, the best size: {side} of both sides"
    )
    parts.append(summary)
    if scores.num_located < scores.num_images:
        missing = scores.num_images - scores.num_located
        parts.append(Text(f"{missing:,} images have no true box and count in top-1 and top-5 only", style="yellow"))
    rate = scores.num_images / max(result.wall_s, 1e-9)
    share = result.waited_s / max(result.inference_s, 1e-9)
    parts.append(Text(f"protocol {result.protocol}, largest component by {result.component}", style="dim"))
    waited = f"boxes kept the network waiting for {share:.0%} of its time"
    parts.append(Text(f"{result.wall_s:.1f} s, {rate:,.0f} images/s, {waited}"))
    parts.append(Text(f"{result.folder}/cam.png, wsol.json", style="dim"))
    if result.notice:
        parts.append(Text(result.notice, style="yellow"))
    return Group(*parts)


def show(result: "Result", console: Console) -> None:
    """Print `render(result)`."""
    console.print(render(result))
