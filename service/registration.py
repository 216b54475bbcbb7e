"""Making a run's bundle a version of a registered model: once, however often it is tried.

An answer that got lost leaves a version nobody knows of. So every attempt first looks for a version of the same run and
the same weights, and the attempt that made one looks again, since an earlier request may have been served late.
"""

import logging
import math
from pathlib import Path
from typing import Any

from service import bundle, store
from service.bundle import Card
from service.errors import ConfigError
from service.naming import is_model_name, legal_key, legal_text
from service.resolution import ARTIFACT

_log = logging.getLogger(__name__)

METRIC = "metric."


def check_name(name: str) -> None:
    """Raises ConfigError if MLflow would not take a registered model of this name."""
    if not is_model_name(name):
        raise ConfigError(f"registry.name: {name!r}: a model's name has letters, digits, '-', '_', '.' and spaces only")


def better(value: float | None, held: float | None, mode: str) -> bool:
    """Whether `value` beats the one held so far; NaN and None never do, and anything finite beats nothing held."""
    if value is None or not math.isfinite(value):
        return False
    if held is None or math.isnan(held):
        return True
    return value > held if mode == "max" else value < held


def enter(api: Any, folder: Path, name: str, run_id: str, metric: str, mode: str) -> int:
    """Upload the bundle in `folder` to its run and make it a version of `name`, unless it is one; returns the version.

    `best` moves to it if its `metric` is better than that of the version that holds the alias.

    Raises:
        CheckpointError: the folder holds no model.
        Exception: what MLflow and the network raise; try again later.
    """
    card = bundle.read_card(folder)
    with store.passing_over("RESOURCE_ALREADY_EXISTS"):
        api.create_registered_model(name)
    known = _versions(api, name, run_id, card)
    if not known:
        api.log_artifacts(run_id, str(folder), ARTIFACT)
        source = f"runs:/{run_id}/{ARTIFACT}"
        # A version is there at once on every store but a hosted one; do not wait for it by the default 300 s.
        made = int(
            api.create_model_version(name, source, run_id, tags=version_tags(card), await_creation_for=20).version
        )
        known = _versions(api, name, run_id, card) or [made]
    aliased = {int(version) for version in api.get_registered_model(name).aliases.values()} if known[1:] else set()
    for twin in set(known[1:]) - aliased:
        _log.warning("%s: version %d is version %d again and is deleted", name, twin, known[0])
        with store.passing_over("RESOURCE_DOES_NOT_EXIST"):
            api.delete_model_version(name, str(twin))
    _move_best(api, name, known[0], card, metric, mode)
    return known[0]


def version_tags(card: Card) -> dict[str, str]:
    """What a registered version says about itself, for `lorot models` and for choosing the best."""
    tags = {
        "data": card.data,
        "data_digest": card.data_digest,
        "pretext": card.pretext,
        "objective": card.objective,
        "run_name": card.run_name,
        "chosen_by": card.chosen_by,
        "weights_sha256": card.weights_sha256,
    }
    tags |= {legal_key(METRIC + key): repr(value) for key, value in card.metrics.items()}
    tags |= {legal_key(f"origin.{key}"): value for key, value in card.origin.items()}
    return {key: legal_text(value) for key, value in tags.items()}


def number(text: str | None) -> float | None:
    """The number that a tag holds; None without one."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _versions(api: Any, name: str, run_id: str, card: Card) -> list[int]:
    """The versions of this very model, oldest first."""
    return sorted(
        int(known.version)
        for known in store.versions(api, name)
        if known.run_id == run_id and known.tags.get("weights_sha256") == card.weights_sha256
    )


def _move_best(api: Any, name: str, version: int, card: Card, metric: str, mode: str) -> None:
    value = card.metrics.get(metric)
    if value is None and not card.metrics:
        return  # nobody has evaluated it: weights that were imported
    if value is None:
        _log.warning("%s: no finite metric %r, so `best` stays; there are: %s", name, metric, ", ".join(card.metrics))
        return
    holder = api.get_registered_model(name).aliases.get("best")
    held = None
    if holder is not None:
        held = number(api.get_model_version(name, str(holder)).tags.get(legal_key(METRIC + metric)))
        if held is None:
            _log.warning("%s: version %s, which is `best`, has no metric %r to compare with", name, holder, metric)
            return
    if better(value, held, mode):
        api.set_registered_model_alias(name, "best", str(version))
