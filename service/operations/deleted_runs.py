"""What runs that were deleted in MLflow still keep of artifacts. MLflow removes those, with the runs, and asks nothing;
so it is looked at first what that would be, and the command is given that removes this and nothing else.
"""

import shlex
import time
import urllib.parse
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from service import artifact_places, store
from service.artifact_places import Roots

_DEEPEST = 32
# What a command line takes.
_RUNS_OF_A_COMMAND = 500


@dataclass(frozen=True)
class DeletedRun:
    """One that is deleted and has artifacts.

    Attributes:
        place: where they lie.
        ended_s: when it ended, or began if nobody knows, seconds since the epoch.
    """

    id: str
    name: str
    place: str
    ended_s: float
    num_bytes: int


@dataclass
class Deleted:
    """What MLflow is to remove, and what is left alone for a reason that a person should know.

    Attributes:
        commands: that do it; none if there is nothing, or none would keep to it.
    """

    runs: list[DeletedRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(run.num_bytes for run in self.runs)


def find(
    uri: str,
    roots: Roots,
    *,
    older_than_s: float,
    experiments: Sequence[str] = (),
    needed: Collection[str] = (),
    now_s: float | None = None,
) -> Deleted:
    """Look for them; changes nothing. Raises TrackingError if MLflow does not answer.

    Args:
        uri: MLflow.
        roots: where artifacts may lie, see `service.artifact_places`.
        older_than_s: since a run's end; a younger one stays.
        experiments: of these alone; empty: of all.
        needed: runs that somebody still reads.
    """
    now_s = time.time() if now_s is None else now_s
    found = Deleted()
    with store.explained(uri):
        api = store.client(uri)
        known = {
            str(one.experiment_id): one for one in store.pages(api.search_experiments, view_type=store.view("all"))
        }
        gone = [own for own, one in known.items() if one.lifecycle_stage == "deleted"]
        registered = _registered(api)
        # Of these MLflow removes all, whichever runs it is told.
        forced: list[str] = []
        asked: dict[str, Any] = {"run_view_type": store.view("deleted_only"), "order_by": ["attributes.start_time ASC"]}
        runs = store.pages(api.search_runs, experiment_ids=list(known), **asked) if known else ()
        for run in runs:
            info = run.info
            ended_s = (info.end_time or info.start_time) / 1000
            # Ours, whatever else is in that MLflow.
            is_wanted = run.data.tags.get("mlflow.source.name") == "lorot"
            is_wanted &= not experiments or known[str(info.experiment_id)].name in experiments
            is_wanted &= now_s - ended_s >= older_than_s
            problem = ""
            if is_wanted:
                named = "is named by a job that has not ended" if info.run_id in needed else ""
                if problem := named or _problem(info, uri, roots, registered):
                    found.notes.append(f"deleted run {info.run_id} {problem}; it stays")
            num_bytes = 0
            if is_wanted and not problem:
                try:
                    num_bytes = _measure(api, info.run_id)
                # What a store of artifacts raises is its client library's.
                except Exception as error:
                    problem = f"keeps artifacts that cannot be looked at ({' '.join(str(error).split())[:200]})"
                    found.notes.append(f"deleted run {info.run_id} {problem}; it stays")
            if problem or not is_wanted:
                forced += [info.run_id] if str(info.experiment_id) in gone else []
            elif num_bytes:
                found.runs.append(DeletedRun(info.run_id, info.run_name, info.artifact_uri, ended_s, num_bytes))
    if forced and found.runs:
        names = ", ".join(shlex.quote(known[own].name) for own in gone)
        found.notes.append(
            f"no command removes these alone: `mlflow gc` always removes deleted experiments whole ({names}), and they "
            f"hold {len(forced)} more runs, as {forced[0]}; bring them back first: "
            + "; ".join(f"mlflow experiments restore -x {own}" for own in gone)
        )
    else:
        found.commands = _commands(uri, [run.id for run in found.runs])
    return found


def _problem(info: Any, uri: str, roots: Roots, registered: dict[str, str]) -> str:
    """Why a run's artifacts are not to be removed; "" if they may be."""
    if info.run_id in registered:
        return f"keeps the registered model {registered[info.run_id]}"
    try:
        artifact_places.refuse_foreign(info.artifact_uri, uri, roots)
    except artifact_places.PlaceError as error:
        return f"keeps {error}"
    return ""


def _registered(api: Any) -> dict[str, str]:
    """Run -> a version that it keeps the weights of."""
    found: dict[str, str] = {}
    for version in store.pages(api.search_model_versions):
        source = urllib.parse.urlsplit(version.source or "")
        keeper = source.path.strip("/").partition("/")[0] if source.scheme == "runs" else ""
        for run_id in filter(None, (version.run_id, keeper)):
            found.setdefault(run_id, f"models:/{version.name}/{version.version}")
    return found


def _measure(api: Any, run_id: str) -> int:
    """Bytes of all artifacts of a run."""
    num_bytes, waiting = 0, [""]
    while waiting:
        for entry in api.list_artifacts(run_id, waiting.pop() or None):
            if not entry.is_dir:
                num_bytes += entry.file_size or 0
            elif entry.path.count("/") < _DEEPEST:
                waiting.append(entry.path)
    return num_bytes


def _commands(uri: str, run_ids: Sequence[str]) -> list[str]:
    parts = urllib.parse.urlsplit(uri)
    if parts.password:
        # As MLflow takes it from PGPASSWORD or ~/.pgpass; it belongs on no command line.
        user, host = parts.username, parts.netloc.rpartition("@")[2]
        uri = urllib.parse.urlunsplit(parts._replace(netloc=f"{user}@{host}"))
    is_server = parts.scheme in ("http", "https")
    line = ["mlflow", "gc", "--tracking-uri", uri, "--backend-store-uri", "DATABASE" if is_server else uri, "--run-ids"]
    pages = [run_ids[start : start + _RUNS_OF_A_COMMAND] for start in range(0, len(run_ids), _RUNS_OF_A_COMMAND)]
    return [shlex.join([*line, ",".join(page)]) for page in pages]
