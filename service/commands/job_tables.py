"""How jobs look on a terminal."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from service.commands.terminal_text import printable

# Digits of an id that are shown, and that any command takes for it.
SHORT = 12
_STYLES = {
    "queued": "yellow",
    "starting": "cyan",
    "running": "cyan",
    "stopping": "magenta",
    "finished": "green",
    "failed": "red",
    "killed": "magenta",
}


def show_list(jobs: Sequence[Mapping[str, Any]], total: int, console: Console, *, is_partial: bool = False) -> None:
    """Print jobs, one a line, and whether there will be more when the service has read them."""
    if is_partial:
        console.print("the service has just been started and still reads jobs that have ended", highlight=False)
    elif not jobs:
        console.print("no such jobs; `lorot submit CONFIG` hands one in")
    if not jobs:
        return
    table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
    for heading in ("id", "name", "kind", "on", "state"):
        table.add_column(heading, no_wrap=True)
    table.add_column("age", justify="right", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for job in jobs:
        state = str(job["state"])
        table.add_row(
            *(job["id"][:SHORT], _safe(job["name"]), job["kind"], job["backend"]),
            f"[{_STYLES.get(state, 'default')}]{state}[/]",
            *(age(job), took(job), _safe(job["reason"])),
        )
    console.print(table, highlight=False)
    if total > len(jobs):
        console.print(f"and {total - len(jobs):,} more; --limit shows them", highlight=False)


def show_one(job: Mapping[str, Any], console: Console) -> None:
    """Print a job with its attempts."""
    state = str(job["state"])
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _lines(job):
        table.add_row(label, _safe(text))
    style = _STYLES.get(state, "default")
    console.print(f"{_safe(job['name'])} [{style}]{state}[/]", style="bold", highlight=False)
    console.print(table, highlight=False)


def show_compared(found: Mapping[str, Any], console: Console) -> None:
    """Print jobs side by side, a column for each."""
    from service.jobs import shown

    for title, rows, best in (
        ("settings that differ", found["settings"], {}),
        ("metrics, last (best)", found["metrics"], found["best"]),
    ):
        table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
        table.add_column(title, overflow="fold")
        for job_id, name in zip(found["jobs"], found["names"], strict=True):
            table.add_column(f"{job_id[:SHORT]}\n{_safe(name)}", overflow="fold")
        for key, values in rows.items():
            bests = best.get(key, [None] * len(values))
            cells = [_compared(pair) for pair in zip(values, bests, strict=True)]
            absent = [f"[dim]{shown.stand_in(key, told)}[/]" for told in found["configurations"]]
            table.add_row(_safe(key), *(cell or word for cell, word in zip(cells, absent, strict=True)))
        if rows:
            console.print(table, highlight=False)
        else:
            console.print(f"{title}: none", highlight=False)
    for caveat in shown.caveats(found):
        console.print(_safe(caveat), highlight=False)


def submitted(job: Mapping[str, Any], is_new: bool, options: str = "") -> str:
    """What is said of a job that was handed in; `options`: what a command takes to find it again."""
    what = f"{job['id'][:SHORT]} {job['state']}: {job['name']}, {job['kind']} on {job['backend']}"
    if not is_new:
        return f"this key's job is here already: {what}"
    return f"{what}; `lorot logs -f {job['id'][:SHORT]}{options}` follows it"


def age(job: Mapping[str, Any]) -> str:
    """Since it was submitted."""
    return _duration(time.time() - job["submitted_s"]) if job["submitted_s"] else ""


def took(job: Mapping[str, Any]) -> str:
    """From its first start to its end, or to now."""
    started = next((one["started_s"] for one in job["attempts"] if one["started_s"]), 0.0)
    return _duration((job["ended_s"] or time.time()) - started) if started else ""


def _lines(job: Mapping[str, Any]) -> list[tuple[str, str]]:
    spec = job["spec"]
    resources = spec.get("resources", {})
    needs = [f"{value} {name}" for name, value in resources.items() if value]
    lines = [
        ("id", job["id"]),
        ("runs", f"{job['kind']} on {job['backend']}" + (f", image {spec['image']}" if spec.get("image") else "")),
        ("takes", f"{', '.join(needs)}" + (f" on each of {spec['nodes']} nodes" if spec.get("nodes") != "1" else "")),
        ("submitted", f"{_when(job['submitted_s'])}" + (f" by {job['owner']}" if job["owner"] else "")),
    ]
    if spec.get("model"):
        lines.append(("model", spec["model"]))
    if spec.get("command"):
        lines.append(("command", " ".join(spec["command"])))
    if job["reason"]:
        lines.append(("reason", job["reason"]))
    if progress := _progress(job.get("progress") or {}):
        lines.append(("progress", progress))
    lines += [(f"attempt {one['number']}", _attempt(one)) for one in job["attempts"]]
    return lines


def _progress(progress: Mapping[str, Any]) -> str:
    parts = []
    if progress.get("step") is not None:
        total = f" of {progress['total_steps']:,}" if progress.get("total_steps") else ""
        parts.append(f"step {progress['step']:,}{total}")
    if progress.get("share") is not None:
        parts.append(f"{progress['share']:.0%}")
    if progress.get("images_per_s") is not None:
        parts.append(f"{progress['images_per_s']:,.0f} images/s")
    if progress.get("data_wait_share") is not None:
        parts.append(f"waits {progress['data_wait_share']:.0%} for data")
    if progress.get("eta_s") is not None:
        parts.append(f"{_duration(progress['eta_s'])} left")
    if progress.get("position") is not None:
        parts.append(f"number {progress['position']} in the queue")
    return ", ".join(parts)


def _attempt(attempt: Mapping[str, Any]) -> str:
    parts = [f"{_when(attempt['started_s'])}" if attempt["started_s"] else "not started yet"]
    if attempt["ended_s"] and attempt["started_s"]:
        parts.append(f"took {_duration(attempt['ended_s'] - attempt['started_s'])}")
    if attempt["exit_code"] is not None:
        parts.append(f"exit code {attempt['exit_code']}")
    if attempt["reason"]:
        parts.append(attempt["reason"])
    return ", ".join(parts)


def _compared(pair: tuple[Any, Any]) -> str:
    last, best = ["" if one is None else f"{one:.4g}" if isinstance(one, float) else str(one) for one in pair]
    return _safe(f"{last} ({best})" if best else last)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
    return f"{seconds // 86400} d"


def _safe(text: Any) -> str:
    """Without what would steer a terminal, or be taken for markup."""
    from rich.markup import escape

    return escape(printable(str(text)))
