"""What a job has measured so far: its run folder's metrics.jsonl, or what MLflow has of it. Imports no torch."""

import json
import math
from pathlib import Path
from typing import Any

from service import plain_files, store
from service.jobs.orders import RUN
from service.run_folder import is_count, parse_metrics

_METRICS = f"{RUN}/metrics.jsonl"
# Of a longer file the end is told.
_MOST_BYTES = 64 << 20
_TAIL_BYTES = 64 << 10
# Of the last records, by which the rest is estimated.
_WINDOW = 20
# Ten years: what takes longer is not known to.
_LONGEST_S = 3.2e8


def metrics(folder: Path, uri: str, job_id: str) -> list[dict[str, float]]:
    """Every record of a job, each with its `step`, in order.

    Args:
        folder: of the job.
        uri: MLflow, asked where the folder has nothing.

    Raises:
        TrackingError: it was asked and does not answer.
    """
    return _last_records(folder, _MOST_BYTES) or _recorded(uri, job_id)


def progress(folder: Path, *, is_running: bool) -> dict[str, Any]:
    """How far a job is; what is not known is missing.

    Returns:
        step, total_steps, share (0 to 1), images_per_s, data_wait_share, eta_s, and `metrics`: the last of each.
    """
    records = _last_records(folder, _TAIL_BYTES)
    found: dict[str, Any] = {}
    total = _about(folder).get("total_steps")
    if is_count(total):
        found["total_steps"] = total
    if not records:
        return found
    step = max(int(record["step"]) for record in records)
    found["step"] = step
    last: dict[str, float] = {}
    for record in records:
        last.update({key: value for key, value in record.items() if key not in ("step", "time_s")})
    found["metrics"] = last
    for name in ("images_per_s", "data_wait_share"):
        if math.isfinite(last.get(f"train/{name}", math.nan)):
            found[name] = last[f"train/{name}"]
    if is_count(total) and total > 0:
        found["share"] = min(1.0, max(0, step) / total)
        rate = _steps_per_s(records[-_WINDOW:])
        if is_running and rate > 0 and (eta_s := max(0, total - step) / rate) < _LONGEST_S:
            found["eta_s"] = eta_s
    return found


def _steps_per_s(records: list[dict[str, float]]) -> float:
    timed = [record for record in records if "time_s" in record]
    if len(timed) < 2:
        return 0.0
    seconds = timed[-1]["time_s"] - timed[0]["time_s"]
    return (timed[-1]["step"] - timed[0]["step"]) / seconds if seconds > 0 else 0.0


def _about(folder: Path) -> dict[str, Any]:
    """The run's run.json; empty if there is none or it is damaged."""
    try:
        content = json.loads(plain_files.text(folder, f"{RUN}/run.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _last_records(folder: Path, most_bytes: int) -> list[dict[str, float]]:
    """The records at the end of a job's metrics.jsonl, however long that is."""
    try:
        content, start = plain_files.end(folder, _METRICS, most_bytes)
        lines = content.split(b"\n")
    except OSError:
        return []
    # What the cut has left of the first line is none.
    return parse_metrics(lines[1 if start else 0 :])


def _recorded(uri: str, job_id: str) -> list[dict[str, float]]:
    with store.explained(uri):
        api = store.client(uri)
        by_step: dict[int, dict[str, float]] = {}
        for name in api.get_run(job_id).data.metrics:
            if name.startswith("system/"):
                continue
            for point in api.get_metric_history(job_id, name):
                record = by_step.setdefault(point.step, {"step": point.step, "time_s": point.timestamp / 1000})
                record[name] = point.value
    return [by_step[step] for step in sorted(by_step)]
