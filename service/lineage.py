"""What was found out about a registered model, and how one finds it again: by weights, data and settings.

Every downstream result is a run of its own below the run that trained the model: it says which version it is about, and
the version carries the numbers as tags. A job that trains something on a model (`lorot detect`) has one run too, and
it is that run which is tagged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service import bundle, provenance, store, tracking
from service.config import TrackingConfig
from service.resolution import Resolved

DOWNSTREAM = "downstream."
# Tags of a run by which an earlier result is found.
WEIGHTS, DATA, CONFIG = "model.weights_sha256", "data_digest", "config_digest"


@dataclass(frozen=True)
class Earlier:
    """A result that is there already.

    Attributes:
        run_id: of its run.
        metrics: by name, without the job's before it, as gt_known@0.5 or AP.
        tags, params: of the run.
    """

    run_id: str
    metrics: dict[str, float]
    tags: dict[str, str]
    params: dict[str, str]


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
    run: tracking.Run, resolved: Resolved, job: str, metrics: Mapping[str, float], headline: Sequence[str] | None = None
) -> None:
    """Let the model's version, if it is a registered one, list what `run` has found: `downstream.JOB.METRIC`."""
    if resolved.name is None or resolved.version is None:
        return
    chosen = metrics if headline is None else headline
    found = {f"{DOWNSTREAM}{job}.{key}": repr(metrics[key]) for key in chosen if math.isfinite(metrics[key])}
    run.tag_model_version(resolved.name, resolved.version, found | {f"{DOWNSTREAM}{job}.run_id": run.run_id})


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
    about = f"{resolved.name}-{resolved.version}" if resolved.version is not None else resolved.folder.resolve().name
    run = tracking.open_run(
        tracking_config.model_copy(update={"system_metrics": False}),
        name=f"{job}-{about}",
        folder=folder,
        tags=run_tags(resolved, job, config_digest=provenance.digest(params or {})) | dict(tags or {}),
    )
    status = "FAILED"
    try:
        run.log_params(params or {})
        run.log_metrics({f"{job}/{key}": value for key, value in metrics.items()}, step=0)
        for path in artifacts:
            run.log_artifact(path, path.name if path.is_dir() else None)
        chosen = None if headline is None else [key.removeprefix(f"{job}/") for key in headline]
        tag_version(run, resolved, job, metrics, chosen)
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
    uri = tracking_uri or store.default_uri()
    if (path := store.sqlite_path(uri)) is not None and not path.exists():
        return []
    store.ensure_ready(uri)
    api = store.client(uri)
    wanted = {"job": job, WEIGHTS: weights_sha256, DATA: data_digest, CONFIG: config_digest}
    # Values in quotes, so none may hold one.
    conditions = [f"tags.`{key}` = '{value.replace(chr(39), '')}'" for key, value in wanted.items()]
    text = " and ".join(["attributes.status = 'FINISHED'", *conditions])
    with store.explained(uri):
        experiments = [found.experiment_id for found in store.pages(api.search_experiments)]
        runs = api.search_runs(experiments, filter_string=text, order_by=["attributes.end_time DESC"])
    return [_earlier(job, run.info.run_id, run.data) for run in runs]


def _earlier(job: str, run_id: str, data: Any) -> Earlier:
    names = {key: value for key, value in data.metrics.items() if key.startswith(f"{job}/")}
    metrics = {key.removeprefix(f"{job}/").replace(":", "@"): value for key, value in names.items()}
    return Earlier(run_id, metrics, dict(data.tags), dict(data.params))


__all__ = ["Earlier", "find_downstream", "log_downstream", "run_tags", "split_digest", "tag_version"]
