"""What jobs with `log_samples` wrote down: the samples of each step, by the attempt at it that counts."""

import contextlib
import json
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple


class Attempt(NamedTuple):
    """Steps that were begun from one start of the workers to the next, and when that was: ns since the epoch."""

    began_ns: int
    first: int
    last: int


def lines_of(run: Path, rank: int) -> list[dict[str, Any]]:
    """What workers of this rank wrote. The last line of one that was killed may be cut short, and is left out."""
    path = run / f"samples-rank{rank}.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def by_step(run: Path) -> dict[int, list[tuple[int, ...]]]:
    """The micro-batches of each step, of all workers, by the latest attempt at it."""
    attempts: dict[int, dict[str, list[tuple[int, ...]]]] = {}
    for path in run.glob("samples-rank*.jsonl"):
        for told in lines_of(run, int(path.stem.removeprefix("samples-rank"))):
            attempts.setdefault(told["step"], {}).setdefault(told["attempt"], []).extend(map(tuple, told["ids"]))
    return {step: sorted(found[max(found)]) for step, found in sorted(attempts.items())}


def order(run: Path) -> list[list[int]]:
    """The samples of steps 1, 2, ... to the last."""
    steps = by_step(run)
    assert list(steps) == list(range(1, len(steps) + 1))
    return [list(chain.from_iterable(parts)) for parts in steps.values()]


def attempts(run: Path) -> list[Attempt]:
    """The attempts of all workers at the job, in order."""
    steps: dict[str, list[int]] = {}
    for path in run.glob("samples-rank*.jsonl"):
        for told in lines_of(run, int(path.stem.removeprefix("samples-rank"))):
            steps.setdefault(told["attempt"], []).append(told["step"])
    return [Attempt(int(name), min(found), max(found)) for name, found in sorted(steps.items())]


def newest_checkpoint(run: Path) -> int:
    """The step of the newest one; 0 without any."""
    return max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-????????")), default=0)


def around(run: Path, moment_ns: int) -> tuple[int, int]:
    """The last step of the attempts begun before a moment, and the first of those begun after it."""
    found = attempts(run)
    before = [attempt.last for attempt in found if attempt.began_ns < moment_ns]
    return max(before), min(attempt.first for attempt in found if attempt.began_ns > moment_ns)
