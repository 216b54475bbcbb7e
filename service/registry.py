"""Registered models: `models:/NAME@ALIAS` to weights, card and lineage, and back.

MLflow reserves the alias `latest`: it is the newest version by itself. `best` is ours and moves only to a better one.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from service import bundle, store
from service.bundle import Card, write_bundle
from service.lineage import DOWNSTREAM, Earlier, find_downstream, is_measured, log_downstream
from service.registration import METRIC, better, check_name, enter, number
from service.resolution import Resolved, cache_folder, load, resolve

_ATTEMPTS = 4


@dataclass(frozen=True)
class Row:
    """One registered version: what it is, how good, where it comes from, and what was found out about it later.

    Attributes:
        aliases: `latest`, `best` and the user's own.
        metrics: by the names of training, as val/top1 (fractions).
        downstream: by JOB.METRIC, as wsol.gt_known@0.5.
        created: when it was registered, UTC.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    metrics: dict[str, float]
    data: str
    data_digest: str
    pretext: str
    objective: str
    run_name: str
    run_id: str
    created: datetime
    downstream: dict[str, float]


def register(
    folder: Path,
    *,
    name: str,
    run_id: str,
    metric: str,
    mode: Literal["max", "min"] = "max",
    tracking_uri: str | None = None,
) -> int:
    """Upload a bundle to its run and make it the newest version of `name`; returns the version.

    `latest` is then this version. The alias `best` moves to it if its `metric` is better than that of the version that
    holds it, or nobody does. Doing it again for the same run and weights finds the version that is there already, so a
    job that lost the server here can be resumed.

    Raises:
        CheckpointError: the folder holds no model.
        ConfigError: MLflow does not accept the name.
        TrackingError: the server is away for more than some seconds, or refuses. The bundle stays where it is.
    """
    bundle.read_card(folder)
    uri = tracking_uri or store.default_uri()
    check_name(name)
    for attempt in range(_ATTEMPTS):
        try:
            with store.explained(uri):
                return enter(store.client(uri), folder, name, run_id, metric, mode)
        except store.UnreachableError:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(2.0**attempt)
    raise AssertionError("the last attempt returns or raises")


def list_models(tracking_uri: str | None = None) -> list[Row]:
    """Every registered version, by name, newest first; raises TrackingError if the server does not answer."""
    uri = tracking_uri or store.default_uri()
    if (path := store.sqlite_path(uri)) is not None and not path.exists():
        return []
    store.ensure_ready(uri)
    api = store.client(uri)
    rows = []
    with store.explained(uri):
        newest: dict[str, int] = {}
        versions = list(store.pages(api.search_model_versions))
        for version in versions:
            newest[version.name] = max(int(version.version), newest.get(version.name, 0))
        models = {model.name: model for model in store.pages(api.search_registered_models)}
        for version in versions:
            if version.name in models:  # else it was deleted between the two questions
                is_newest = int(version.version) == newest[version.name]
                rows.append(_row(version, models[version.name].aliases, is_newest))
    return sorted(rows, key=lambda row: (row.name, -row.version))


def _row(version: Any, aliases: Mapping[str, Any], newest: bool) -> Row:
    held = [alias for alias, holder in aliases.items() if int(holder) == int(version.version)]
    tags = version.tags
    return Row(
        name=version.name,
        version=int(version.version),
        aliases=tuple(sorted(held + (["latest"] if newest else []))),
        metrics=_numbers(tags, METRIC),
        data=tags.get("data", ""),
        data_digest=tags.get("data_digest", ""),
        pretext=tags.get("pretext", ""),
        objective=tags.get("objective", ""),
        run_name=tags.get("run_name", ""),
        run_id=version.run_id or "",
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
        downstream={
            key.replace(":", "@"): value for key, value in _numbers(tags, DOWNSTREAM).items() if is_measured(key)
        },
    )


def _numbers(tags: Mapping[str, str], prefix: str) -> dict[str, float]:
    values = {key.removeprefix(prefix): number(text) for key, text in tags.items() if key.startswith(prefix)}
    return {key: value for key, value in values.items() if value is not None}


__all__ = [
    "Card",
    "Earlier",
    "Resolved",
    "Row",
    "better",
    "cache_folder",
    "find_downstream",
    "list_models",
    "load",
    "log_downstream",
    "register",
    "resolve",
    "write_bundle",
]
