"""What a job that has been through all that may have lost. Each check returns complaints; none means nothing."""

import json
import math
import signal
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from service.errors import EXIT_CODES
from tests.integration.small_job import MEASURED

# What launchers are asked to stop by.
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Point(NamedTuple):
    """A logged value."""

    step: int
    value: float


def samples(order: Sequence[Sequence[int]], total: int, batch: int) -> list[str]:
    """That each step had a whole batch, and each epoch every sample once.

    Args:
        order: the sample ids of steps 1, 2, ...
        total: samples of an epoch. An epoch may end within a step.
        batch: samples of a step.
    """
    found = [f"step {n} had {len(ids)} samples" for n, ids in enumerate(order, start=1) if len(ids) != batch]
    seen: Counter[int] = Counter()
    for step, ids in enumerate(order, start=1):
        seen.update(ids)
        epochs, further = divmod(step * batch, total)
        expected = Counter({epochs: total - further, epochs + 1: further})
        counts = Counter(seen[sample] for sample in range(total))
        if len(seen) > total or +counts != +expected:
            found.append(f"after step {step} samples had been seen {dict(counts)} times instead of {dict(expected)}")
            break
    if not order:
        found.append("no samples were written down")
    return found


def record(history: Iterable[tuple[str, Sequence[Point]]], lines: Sequence[dict[str, Any]]) -> list[str]:
    """That the tracking server has each value of the run's own record once, in order, and no other.

    Args:
        history: of each metric what the server has, in its order.
        lines: of metrics.jsonl.
    """
    expected: dict[str, list[Point]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "time_s"):
                expected.setdefault(name, []).append(Point(line["step"], value))
    found = []
    server = {name: list(points) for name, points in history}
    for name in sorted(expected.keys() | server.keys()):
        own, theirs = expected.get(name, []), server.get(name, [])
        if [point.step for point in own] != [point.step for point in theirs]:
            lost = sorted({p.step for p in own} - {p.step for p in theirs})
            strange = sorted({p.step for p in theirs} - {p.step for p in own})
            twice = sorted(step for step, count in Counter(p.step for p in theirs).items() if count > 1)
            found.append(f"{name}: lost steps {lost[:5]}, unknown steps {strange[:5]}, repeated steps {twice[:5]}")
        elif is_measured(name):
            # Of a step that was made twice the server keeps what the clock said first, the run what it said last.
            continue
        elif not all(math.isclose(a.value, b.value, rel_tol=1e-9) for a, b in zip(own, theirs, strict=True)):
            found.append(f"{name}: the server has other values")
    return found


def is_measured(name: str) -> bool:
    """Whether a value is what the clock and the machine said, not what training did."""
    return name in MEASURED or "step_time" in name


def steps(lines: Sequence[dict[str, Any]], total: int, every: int) -> list[str]:
    """That the run's record has the figures of every `every`-th step to the last, once."""
    had = [line["step"] for line in lines if "train/loss" in line]
    wanted = [*range(every, total, every), total]
    return [] if had == wanted else [f"training figures of steps {sorted(set(had) ^ set(wanted))[:5]} lost or repeated"]


def ends(counts: Mapping[int, int]) -> list[str]:
    """That launchers ended as they can explain, or by a signal that they were sent before they listened to it.

    Args:
        counts: how often, by exit code; the negative number of a signal.
    """
    told = {*EXIT_CODES} - {1} | {-number for number in (signal.SIGKILL, *STOPS)}
    strange = {code: count for code, count in sorted(counts.items()) if code not in told}
    return [f"launchers ended with exit code {code}, {count} times" for code, count in strange.items()]


def left_out(run: Path, expected: Iterable[str]) -> list[str]:
    """That left_out.json names these images of the evaluation, and none that is trained on."""
    path = run / "left_out.json"
    told = json.loads(path.read_text()) if path.exists() else {"train": [], "eval": []}
    named = sorted(image_name(line.partition(": ")[0]) for line in told["eval"])
    found = [f"images of training were left out: {told['train'][:3]}"] if told["train"] else []
    return found + ([] if named == sorted(expected) else [f"left out of evaluations: {named}, not {sorted(expected)}"])


def image_name(place: str) -> str:
    """The name of an image's file, or of the one it was made from, by what a data set says of its place."""
    return place.rpartition("/")[2].rstrip(")")


def not_finite(
    summary: Mapping[str, Any], lines: Sequence[dict[str, Any]], losses: Sequence[dict[str, Any]]
) -> list[str]:
    """That the updates of the steps whose losses were not finite, and no others, were left out, and for these samples.

    Args:
        lines: of metrics.jsonl.
        losses: step and samples of each loss that was made not finite, in order: of a step that was made again the last
            one counts.
    """
    last = {loss["step"]: loss["samples"] for loss in losses}
    expected = [
        {"step": step, "kind": "loss", "samples": ids, "num_samples": len(ids)} for step, ids in sorted(last.items())
    ]
    found = []
    if summary["skipped_steps"] != sorted(last):
        found.append(f"the summary has updates of steps {summary['skipped_steps']} left out, not of {sorted(last)}")
    told = summary["nonfinite_steps"]
    if wrong := [one for one in told if one not in expected]:
        found.append(f"the summary says of losses that were not finite {wrong[:3]}")
    elif len(told) != len(expected):
        found.append(f"the summary names only {len(told)} of {len(expected)} losses that were not finite")
    counted = [(line["step"], line["train/skipped_steps"]) for line in lines if "train/skipped_steps" in line]
    if wrong := [(step, count) for step, count in counted if count != sum(bad <= step for bad in last)]:
        found.append(f"the record counts other updates as left out: {wrong[:3]} (step, updates)")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def tracked(database: str, total: int, run: Path, every: int, name: str | None = None) -> list[str]:
    """That the tracking server has the job as one finished run with its whole record and one registered model.

    Args:
        every: steps from one record to the next.
        name: of the run; None: as its folder.
    """
    import mlflow

    api = mlflow.MlflowClient(database)
    own = json.loads((run / "run.json").read_text())["run_id"]
    experiment = api.get_run(own).info.experiment_id
    name = name or run.name
    named = api.search_runs([experiment], f"attributes.run_name = '{name}'")
    found = [] if len(named) == 1 else [f"{len(named)} runs are called {name}"]
    status = api.get_run(own).info.status
    if status != "FINISHED":
        found.append(f"the run is {status}")
    lines = read_lines(run / "metrics.jsonl")
    found += steps(lines, total, every)
    keys = sorted(api.get_run(own).data.metrics)
    history = ((key, [Point(p.step, p.value) for p in api.get_metric_history(own, key)]) for key in keys)
    found += record(history, lines)
    versions = api.search_model_versions(f"run_id = '{own}'")
    if len(versions) != 1:
        found.append(f"{len(versions)} versions of the model are registered")
    return found
