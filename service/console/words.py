"""How the console says things: states, times, amounts, where a job runs, what a program wrote."""

import math
import re
import signal
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from service.errors import EXIT_CODES
from service.jobs import traits
from service.jobs.job import Attempt, Job
from service.report import duration

STATES: Mapping[str, str] = {
    "queued": "waits for its turn",
    "starting": "is being started",
    "running": "runs",
    "stopping": "is being stopped",
    "finished": "is finished",
    "failed": "has failed",
    "killed": "was stopped",
}
# How metrics begin whose values are fractions.
_SHARES = ("top1", "top5", "gt_known", "AP", "max_box_acc", "centre_box")
# Terminal escapes: CSI (colours, cursor), OSC (titles, links), and the other two-character ones.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])?|\x9b[0-?]*[ -/]*[@-~]")
# Invisible ones that could make a line read otherwise than it is: controls, and marks of the writing direction.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def ago(then_s: float, now_s: float) -> str:
    """A moment as seen from another: `12 s ago`, `3 min ago`, `2 h ago`, `5 days ago`; empty for 0."""
    if not then_s:
        return ""
    past = max(0.0, now_s - then_s)
    for size, unit in ((86400.0, "day"), (3600.0, "h"), (60.0, "min")):
        if past >= size:
            count = int(past // size)
            return f"{count} {unit}{'s' if unit == 'day' and count > 1 else ''} ago"
    return f"{int(past)} s ago"


def moment(then_s: float) -> str:
    """The absolute time, UTC, to the second; empty for 0."""
    return datetime.fromtimestamp(then_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if then_s else ""


def machine_time(then_s: float) -> str:
    """The same for the `datetime` attribute."""
    return datetime.fromtimestamp(then_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if then_s else ""


def span(seconds: float) -> str:
    """A length of time without needless precision: `45 s`, `12 min 5 s`, `3 h 20 min`, `4 days 2 h`."""
    if seconds < 60:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 48 * 3600:
        return duration(seconds)
    days, rest = divmod(int(seconds), 86400)
    return f"{days} days {rest // 3600} h"


def exit_words(code: int | None) -> str:
    """What an exit code means: `5: no usable checkpoint or model`, `SIGKILL`; empty if nobody knows it."""
    if code is None:
        return ""
    if code < 0:
        known = {one.value: one.name for one in signal.Signals}
        return f"ended by {known.get(-code, f'signal {-code}')}"
    return f"{code}: {EXIT_CODES[code]}" if code in EXIT_CODES else str(code)


def place(job: Job) -> str:
    """Where a job runs, in a few words."""
    spec = job.spec
    shape = "" if spec.nodes == "1" else f", {spec.nodes.replace(':', ' to ')} nodes"
    return f"{traits.of(spec.backend).jobs_are}{shape}"


def handle(job: Job, attempt: Attempt) -> str:
    """What the backend finds an attempt by, in words: `a process of this machine: pid 812`."""
    known = [f"{_key(key)} {_value(value)}" for key, value in attempt.handle.items() if value not in (None, "", [], {})]
    return f"{place(job)}: {attempt.name}{', ' if known else ''}{', '.join(known)}"


def plain(text: str) -> str:
    """What a program wrote, as lines to be read: no terminal escapes, no controls, of a progress bar its last state."""
    lines = []
    for line in _ESCAPES.sub("", text.replace("\r\n", "\n")).split("\n"):
        lines.append(_CONTROLS.sub("�", line.rstrip("\r").rpartition("\r")[2]))
    return "\n".join(lines)


def tail(pieces: Iterable[bytes], most_bytes: int = 200_000) -> str:
    """The end of a log as plain text."""
    kept = bytearray()
    for piece in pieces:
        kept += piece
        if len(kept) > 2 * most_bytes:
            del kept[:-most_bytes]
    was_cut = len(kept) > most_bytes
    text = bytes(kept[-most_bytes:]).decode("utf-8", "replace")
    return plain(text.partition("\n")[2] if was_cut else text)


def number(value: float) -> str:
    """A metric's value in at most four digits, thousands parted."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def metric(name: str, value: float) -> str:
    """A metric as people read it: accuracies, shares and precisions in per cent."""
    parts = re.split(r"[/.@:]", name)
    is_share = any(part.startswith(_SHARES) or part.endswith(("accuracy", "share")) for part in parts)
    return f"{value:.1%}" if is_share and -1.0 <= value <= 1.0 else number(value)


def setting(value: Any) -> str:
    """A configuration's value as YAML has it; empty for none."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _key(key: str) -> str:
    return key.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_value, value))
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    text = str(value)
    # Of a digest or an id, enough to tell it from others.
    return text[:19] + "…" if re.fullmatch(r"(?:sha256:)?[0-9a-f]{40,}", text) else text
