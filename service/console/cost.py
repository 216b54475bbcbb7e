"""What a job has cost so far, as far as it is known: by the attempts that are kept."""

from collections.abc import Mapping
from typing import Any

from service.console.words import span
from service.jobs.job import Job


def seconds(job: Job, now_s: float) -> float:
    """Wall time of all attempts together."""
    return sum(
        max(0.0, (attempt.ended_s or (job.ended_s if job.has_ended else now_s)) - attempt.started_s)
        for attempt in job.attempts
        if attempt.started_s
    )


def rows(job: Job, progress: Mapping[str, Any], config: Mapping[str, Any], now_s: float) -> list[tuple[str, str]]:
    """(what, how much). GPU-hours and core-hours are what was set aside for it: resources x nodes x time.

    Args:
        config: resolved; empty where it is not known.
    """
    wall = seconds(job, now_s)
    if not wall:
        return []
    asked = job.spec.resources
    most = job.spec.most_nodes
    up_to = "up to " if job.spec.fewest_nodes != most else ""
    since = f" since attempt {job.attempts[0].number}" if job.attempts[0].number > 1 else ""
    found = [(f"Wall time{since}", span(wall))]
    if asked.gpus:
        found.append(("GPU-hours", f"{up_to}{_hours(wall * asked.gpus * most)}"))
    found.append(("Core-hours", f"{up_to}{_hours(wall * asked.cpus * most)}"))
    batch, step = config.get("global_batch"), progress.get("step")
    if isinstance(batch, int) and step:
        found.append(("Images trained on", f"{batch * step:,.0f}"))
    return found


def _hours(seconds_: float) -> str:
    hours = seconds_ / 3600
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}" if hours < 0.1 else f"{hours:.2f}"
