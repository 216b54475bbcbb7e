"""What was found out about a registered model, and how one finds it again: by weights, data and settings.

Every downstream result is a run of its own below the run that trained the model: it says which version it is about, and
the version carries the numbers as tags. A job that trains something on a model (`lorot detect`) has one run too, and
it is that run which is tagged.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service import bundle, provenance, store, tracking
from service.config import TrackingConfig
from service.resolution import Resolved
from service.run_folder import RunFolder

DOWNSTREAM = "downstream."
# Tags of a run by which an earlier result is found.
WEIGHTS, DATA, CONFIG = "model.weights_sha256", "data_digest", "config_digest"
# In a run's folder: the model that it began with, and beside its files where that comes from.
BACKBONE, _ORIGIN = "backbone", "origin.json"
_ORIGIN_KEYS = ("asked", "uri", "name", "version", "run_id")
# Of a version's tags, besides numbers that were measured: by which run, on what, how.
_RUN, _SEED = "run_id", "seed"
_ABOUT = frozenset({_RUN, DATA, CONFIG, _SEED})


@dataclass(frozen=True)
class Earlier:
    """A result that is there already.

    Attributes:
        run_id: of its run.
        metrics: by name, without the job's before it, as gt_known@0.5 or AP.
        tags, params: of the run.
        began_ms, ended_ms: when it began and ended, ms since the epoch; None if unknown.
    """

    run_id: str
    metrics: dict[str, float]
    tags: dict[str, str]
    params: dict[str, str]
    began_ms: int | None = None
    ended_ms: int | None = None


def run_tags(resolved: Resolved, job: str, *, config_digest: str, weights_sha256: str = "") -> dict[str, Any]:
    """What the run of a downstream job says about the model that it is about.

    Args:
        config_digest: `provenance.digest` of all settings that the result follows from.
        weights_sha256: of the model; default: as its card says.
    """
    weights = weights_sha256 or bundle.read_card(resolved.folder).weights_sha256
    tags: dict[str, Any] = {"job": job, "model.uri": resolved.uri, WEIGHTS: weights, CONFIG: config_digest}
    if resolved.version is not None:
        tags |= {"model.name": resolved.name, "model.version": resolved.version}
    if resolved.run_id is not None:
        tags |= {"model.run_id": resolved.run_id, "mlflow.parentRunId": resolved.run_id}
    return tags


def split_digest(train: str, evaluated: str) -> str:
    """The tag `data_digest` of a job that learns from one split and is measured on another, from their digests."""
    return provenance.digest({"train": train, "eval": evaluated})


def tag_version(
    run: tracking.Run,
    resolved: Resolved,
    job: str,
    metrics: Mapping[str, float],
    headline: Sequence[str] | None = None,
    *,
    data_digest: str = "",
    config_digest: str = "",
    seed: int | None = None,
) -> None:
    """Let the model's version, if it is a registered one, list what `run` has found: `downstream.JOB.METRIC`.

    A later run of the job replaces all of it, so what it was measured on and how stands beside it.

    Args:
        headline: the metrics to list; empty is written where one cannot be said, lest an earlier run's stays. Default:
            all there are.
        data_digest, config_digest, seed: of `run`, as its tags; "" and None for unknown.
    """
    if resolved.name is None or resolved.version is None:
        return
    values = {key: metrics.get(key, math.nan) for key in (metrics if headline is None else headline)}
    found = {key: repr(value) if math.isfinite(value) else "" for key, value in values.items()}
    found |= {_RUN: run.run_id, DATA: data_digest, CONFIG: config_digest, _SEED: "" if seed is None else str(seed)}
    tags = {f"{DOWNSTREAM}{job}.{key}": text for key, text in found.items()}
    run.tag_model_version(resolved.name, resolved.version, tags)


def is_measured(name: str) -> bool:
    """Whether JOB.NAME, of a version's tags, is a metric, and not what it was measured on and how."""
    return name.partition(".")[2] not in _ABOUT


def read_origin(place: Path) -> dict[str, Any] | None:
    """What was written down beside the copy of a model in a run's folder; None without a whole one."""
    try:
        origin = json.loads((place / _ORIGIN).read_text())
    except (OSError, ValueError):
        return None
    return origin if isinstance(origin, dict) and origin.keys() >= set(_ORIGIN_KEYS) else None


def origin_file(asked: str, resolved: Resolved) -> dict[str, bytes]:
    """The file beside such a copy, by name: what was `asked` for, and what it was."""
    values = (asked, resolved.uri, resolved.name, resolved.version, resolved.run_id)
    return {_ORIGIN: json.dumps(dict(zip(_ORIGIN_KEYS, values, strict=True))).encode()}


def kept_backbone(folder: RunFolder) -> Resolved | None:
    """The copy of the model that the run in this folder stands on; None if none has come to a checkpoint there."""
    place = folder.path / BACKBONE
    origin = read_origin(place) if folder.is_taken() else None
    return None if origin is None else copied(place, origin)


def copied(place: Path, origin: Mapping[str, Any]) -> Resolved:
    """The copy in `place`, with the lineage that `read_origin` tells."""
    return Resolved(place, origin["uri"], origin["name"], origin["version"], origin["run_id"])


def log_downstream(
    resolved: Resolved,
    job: str,
    metrics: Mapping[str, float],
    *,
    tracking_config: TrackingConfig,
    folder: Path,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    artifacts: Sequence[Path] = (),
    headline: Sequence[str] | None = None,
) -> tuple[str, str]:
    """Record what a job found out about a model: a run below the model's own, and tags on the registered version.

    `find_downstream` finds it again by the weights, the tag `data_digest`, and the digest of `params`.

    Args:
        job: its name, as wsol; comes before the metrics' names: `wsol/gt_known@0.5` in the run (MLflow writes `:` for
            `@`), `downstream.wsol.gt_known@0.5` on the version.
        folder: of the job's results; its records wait there while the server is away.
        params: all settings that the metrics follow from.
        tags: as the data set's name, and `data_digest`.
        artifacts: files and folders to keep.
        headline: the metrics that become tags of the version; default all.

    Returns:
        The run's id, and a sentence for the user if some records could not be sent yet, else "".

    Raises:
        TrackingError: the server does not answer, or refuses.
    """
    metrics = {key.removeprefix(f"{job}/"): float(value) for key, value in metrics.items()}
    config_digest = provenance.digest(params or {})
    about = f"{resolved.name}-{resolved.version}" if resolved.version is not None else resolved.folder.resolve().name
    run = tracking.open_run(
        tracking_config.model_copy(update={"system_metrics": False}),
        name=f"{job}-{about}",
        folder=folder,
        tags=run_tags(resolved, job, config_digest=config_digest) | dict(tags or {}),
    )
    status = "FAILED"
    try:
        run.log_params(params or {})
        run.log_metrics({f"{job}/{key}": value for key, value in metrics.items()}, step=0)
        for path in artifacts:
            run.log_artifact(path, path.name if path.is_dir() else None)
        chosen = None if headline is None else [key.removeprefix(f"{job}/") for key in headline]
        data_digest, seed = str((tags or {}).get(DATA, "")), (params or {}).get("seed")
        known: dict[str, Any] = {"data_digest": data_digest, "config_digest": config_digest, "seed": seed}
        tag_version(run, resolved, job, metrics, chosen, **known)
        status = "FINISHED"
    finally:
        notice = run.finish(status)
    return run.run_id, notice


def find_downstream(
    job: str,
    weights_sha256: str,
    *,
    data_digest: str,
    config_digest: str,
    tracking_uri: str | None = None,
) -> list[Earlier]:
    """Finished results of the same job for the same weights, data and settings, in every experiment; newest first.

    Raises:
        TrackingError: the server does not answer, or refuses.
    """
    return _search(job, {WEIGHTS: weights_sha256, DATA: data_digest, CONFIG: config_digest}, tracking_uri)


def find_alike(job: str, *, data_digest: str, tracking_uri: str | None = None) -> list[Earlier]:
    """Finished results of the same job on the same data, of any weights and settings; newest first.

    Raises:
        TrackingError: the server does not answer, or refuses.
    """
    return _search(job, {DATA: data_digest}, tracking_uri)


def _search(job: str, tags: Mapping[str, str], tracking_uri: str | None) -> list[Earlier]:
    uri = tracking_uri or store.default_uri()
    if (path := store.sqlite_path(uri)) is not None and not path.exists():
        return []
    store.ensure_ready(uri)
    api = store.client(uri)
    wanted = {"job": job, **tags}
    # Values in quotes, so none may hold one.
    conditions = [f"tags.`{key}` = '{value.replace(chr(39), '')}'" for key, value in wanted.items()]
    text = " and ".join(["attributes.status = 'FINISHED'", *conditions])
    with store.explained(uri):
        experiments = [found.experiment_id for found in store.pages(api.search_experiments)]
        runs = api.search_runs(experiments, filter_string=text, order_by=["attributes.end_time DESC"])
    return [_earlier(job, run) for run in runs]


def _earlier(job: str, run: Any) -> Earlier:
    data, info = run.data, run.info
    names = {key: value for key, value in data.metrics.items() if key.startswith(f"{job}/")}
    metrics = {key.removeprefix(f"{job}/").replace(":", "@"): value for key, value in names.items()}
    return Earlier(info.run_id, metrics, dict(data.tags), dict(data.params), info.start_time, info.end_time)


__all__ = [
    *("BACKBONE", "CONFIG", "DATA", "DOWNSTREAM", "WEIGHTS"),
    *("Earlier", "copied", "find_alike", "find_downstream", "is_measured", "kept_backbone", "log_downstream"),
    *("origin_file", "read_origin", "run_tags", "split_digest", "tag_version"),
]
