"""What a configuration amounts to, worked out by a process of its own, so that the service need not load torch."""

import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter

from service import artifact_places, provenance
from service.artifact_places import Roots
from service.errors import LorotError

if TYPE_CHECKING:
    from service.check import Outline
    from service.config import TrainingConfig

_REMEMBERED = 128
_TIMEOUT_S = 150.0
# A data set that nobody has listed yet can take long, and more than one at a time would slow what runs here.
_WAIT_S = 20.0
# Those who wait for their turn hold a thread each.
_THREADS = 4
_PROBLEM = "problem"


@dataclass(frozen=True)
class Amounts:
    """What `lorot check` says of it.

    Attributes:
        rows: (what, how much).
        warnings: what would run, but badly.
        missing: data that is not there.
        unknown: what of it is not worked out here, and why; "" if all is.
        problem: why nothing could be worked out; "" if it could.
    """

    rows: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unknown: str = ""
    problem: str = ""


class Estimator:
    """Answers from memory, or asks one process at a time. Thread-safe.

    Attributes:
        threads: for those who ask, apart from all others.

    Args:
        uri: MLflow, where models are looked up.
    """

    def __init__(self, uri: str, roots: Roots = ()) -> None:
        self.threads = CapacityLimiter(_THREADS)
        # Another process, which reads a model's artifacts where the service may, and nowhere else.
        self._told = {
            "MLFLOW_TRACKING_URI": uri,
            artifact_places.VARIABLE: json.dumps(artifact_places.absolute(roots)),
        }
        self._known: OrderedDict[str, Amounts] = OrderedDict()
        self._lock = threading.Lock()
        self._asking = threading.Lock()

    def known(self, resolved: Mapping[str, Any], workers: int | None) -> Amounts | None:
        """What was worked out before; None if it was not."""
        with self._lock:
            return self._known.get(_key(resolved, workers))

    def ask(self, resolved: Mapping[str, Any], workers: int | None) -> Amounts:
        """Work it out; takes seconds the first time."""
        key = _key(resolved, workers)
        if not self._asking.acquire(timeout=_WAIT_S):
            return Amounts(problem="others are asking just now; try again in some seconds")
        try:
            if (found := self.known(resolved, workers)) is not None:
                return found
            found, is_lasting = _ask(resolved, workers, self._told)
            if is_lasting:
                with self._lock:
                    self._known[key] = found
                    while len(self._known) > _REMEMBERED:
                        self._known.popitem(last=False)
            return found
        finally:
            self._asking.release()


def _key(resolved: Mapping[str, Any], workers: int | None) -> str:
    return provenance.digest({"config": resolved, "workers": workers})


def _ask(resolved: Mapping[str, Any], workers: int | None, told: Mapping[str, str]) -> tuple[Amounts, bool]:
    """The answer, and whether it would be the same again."""
    # A checkout need not be the working folder.
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    own = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        **told,
    }
    question = json.dumps({"config": resolved, "workers": workers}, default=str)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "service.console.amounts"],
            input=question,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env=os.environ | own,
            check=False,
        )
        answer = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Amounts(problem=f"not worked out within {_TIMEOUT_S:.0f} s; `lorot check` takes its time"), False
    except (OSError, ValueError, IndexError):
        return Amounts(problem="cannot be worked out on this machine; the job's own may differ"), False
    if answer.get(_PROBLEM):
        return Amounts(problem=answer[_PROBLEM]), False
    rows = tuple((str(what), str(amount)) for what, amount in answer["rows"])
    found = Amounts(rows, tuple(answer["warnings"]), tuple(answer["missing"]), answer["unknown"])
    return found, not found.missing


def examine(config: Mapping[str, Any], workers: int | None) -> Amounts:
    """The work itself, where torch may be loaded; without it, all but what the network takes."""
    from service import check
    from service.config import JobConfig, resolve_any

    job = resolve_any(dict(config))
    if lacking := _lacking():
        known = check.outline(job, workers)
        told = (
            f"Parameters, memory and storage are not worked out here: they take the network itself, and {lacking} is "
            "not installed beside this service. Where it is, `lorot check` works them out."
        )
    else:
        known, told = check.examine(job, workers), ""
    rows = [(f"Data, {one.name}", f"{one.samples:,} samples, {one.classes} classes") for one in known.splits]
    rows += _of_network(known)
    batch = f"{known.workers} x {job.micro_batch} x {known.accumulation}"
    rows.append(("Global batch", f"{job.global_batch} = {batch} (workers x micro-batch x accumulation)"))
    if (plan := known.plan) is not None:
        rows.append(("Steps", f"{plan.total_steps:,} ({job.duration})"))
        rows.append(("Evaluations", f"{plan.evaluations}, every {job.evaluate_every}"))
        rows.append(("Checkpoints", f"{plan.checkpoints}"))
        rows.append(
            ("Learning rate", f"{check.sparkline(plan.rates[::4])} {job.schedule.name}, peak {job.optimizer.lr:g}")
        )
    rows += _of_room(known)
    if isinstance(job, JobConfig):
        rows.append(("Registered as", job.model_name or "not registered"))
    return Amounts(tuple(rows), known.warnings, known.missing, told)


def _lacking() -> str:
    """The library without which no network can be built here; "" if there is none."""
    try:
        from service import models  # noqa: F401
    except ModuleNotFoundError as error:
        return error.name or str(error)
    return ""


def _of_network(known: "Outline[TrainingConfig]") -> list[tuple[str, str]]:
    from service.check import Findings
    from service.config import DetectionConfig, JobConfig

    job = known.job
    assert isinstance(job, JobConfig | DetectionConfig), "these are all kinds there are"
    counted = f", {known.parameters:,} parameters" if isinstance(known, Findings) else ""
    begins = [("Begins with", known.trunk)] if known.trunk else []
    return [("Model", f"{job.model.name}{counted}"), *begins]


def _of_room(known: "Outline[TrainingConfig]") -> list[tuple[str, str]]:
    from pipelines.amounts import shown_bytes
    from service.check import Findings

    if not isinstance(known, Findings):
        return []
    storage = f"about {shown_bytes(known.storage_bytes)}, {shown_bytes(known.checkpoint_bytes)} a checkpoint"
    return [
        ("Memory of a worker", f"about {shown_bytes(sum(known.memory.values()))}"),
        ("Storage", f"{storage}; {shown_bytes(known.free_bytes)} free"),
    ]


def main() -> None:
    """Answer the question on standard input by one line of JSON."""
    question = json.load(sys.stdin)
    try:
        found = examine(question["config"], question["workers"])
    except LorotError as error:
        found = Amounts(problem=str(error))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()


__all__ = ["Amounts", "Estimator", "examine", "main"]
