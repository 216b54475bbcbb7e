"""What a job has cost so far, as far as it is known."""

from collections.abc import Mapping, Sequence
from typing import Any

from service.console.words import span
from service.jobs.job import Job

# What a worker or an operator's hook may have measured. It is shown if it is there, and never guessed.
_ENERGY_J = ("train/energy_j", "system/energy_j")


def seconds(job: Job, now_s: float) -> float:
    """Wall time of all attempts together."""
    return sum(
        max(0.0, (attempt.ended_s or (job.ended_s if job.has_ended else now_s)) - attempt.started_s)
        for attempt in job.attempts
        if attempt.started_s
    )


def rows(
    job: Job, progress: Mapping[str, Any], history: Sequence[Mapping[str, float]], now_s: float
) -> list[tuple[str, str]]:
    """(what, how much). GPU-hours and core-hours are what was set aside for it: resources x nodes x time."""
    wall = seconds(job, now_s)
    if not wall:
        return []
    asked = job.spec.resources
    most = job.spec.most_nodes
    up_to = "up to " if job.spec.fewest_nodes != most else ""
    found = [("Wall time", span(wall))]
    if asked.gpus:
        found.append(("GPU-hours", f"{up_to}{_hours(wall * asked.gpus * most)}"))
    found.append(("Core-hours", f"{up_to}{_hours(wall * asked.cpus * most)}"))
    images = progress.get("images") or _images(job, progress)
    if images:
        found.append(("Images trained on", f"{images:,.0f}"))
    energy = next((row[key] for row in reversed(history) for key in _ENERGY_J if key in row), None)
    if energy is not None:
        found.append(("Energy", f"{energy / 3.6e6:,.3g} kWh"))
    return found


def _images(job: Job, progress: Mapping[str, Any]) -> float:
    batch, step = job.spec.config.get("global_batch"), progress.get("step")
    return batch * step if isinstance(batch, int) and isinstance(step, int | float) else 0


def _hours(seconds_: float) -> str:
    hours = seconds_ / 3600
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}" if hours < 0.1 else f"{hours:.2f}"
