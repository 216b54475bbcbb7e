"""Making a run in MLflow: one, even if the server's answer is lost and the question has to be put again."""

import contextlib
import getpass
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from service import provenance, store
from service.errors import TrackingError

# By this tag a run is found again whose creation was never answered.
_KEY = "lorot.key"
_ATTEMPTS = 5
_LONGEST_S = 60.0


@dataclass(frozen=True)
class Made:
    """A run that there is now; whether this made it, or an earlier question with the same key had."""

    run_id: str
    experiment_id: str
    is_new: bool


def create_run(uri: str, experiment: str, name: str) -> str:
    """Start a run; returns its id. A server that stumbles is asked again for some seconds.

    Raises:
        TrackingError: the server does not answer, or refuses.
    """
    return create(uri, experiment, name).run_id


def create(
    uri: str, experiment: str, name: str, *, tags: Mapping[str, str] = MappingProxyType({}), key: str | None = None
) -> Made:
    """As `create_run`, with further tags.

    Args:
        key: one run in all for each such text, of letters, digits and `%-._~/`, however often it is asked for; None:
            a new run. Who asks at the same time as somebody else has to take turns with them.
    """
    store.ensure_ready(uri)
    own = {"mlflow.source.name": "lorot", "mlflow.source.type": "LOCAL", _KEY: key or uuid.uuid4().hex}
    with contextlib.suppress(Exception):  # a container's user may have no name
        own["mlflow.user"] = getpass.getuser()
    if commit := provenance.code_version().get("git.commit"):
        own["mlflow.source.git.commit"] = commit
    began = time.monotonic()
    for attempt in range(_ATTEMPTS):
        try:
            with store.explained(uri):
                return _create_once(uri, experiment, name, {**tags, **own}, bool(key), again=attempt > 0)
        except store.UnreachableError:
            if attempt == _ATTEMPTS - 1 or time.monotonic() - began > _LONGEST_S:
                raise
            time.sleep(0.5 * 2.0**attempt)
    raise AssertionError("the last attempt returns or raises")


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set up to a hundred tags of a run in one request: all or none; raises TrackingError."""
    with store.explained(uri):
        from mlflow.entities import RunTag

        store.client(uri).log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def _create_once(uri: str, experiment: str, name: str, tags: dict[str, str], keyed: bool, again: bool) -> Made:
    api = store.client(uri)
    experiment_id = _experiment_id(uri, experiment)
    found = _made(api, experiment_id, tags[_KEY]) if again or keyed else []
    # After a lost answer nobody knows who has made it; it is this question's own if the key is.
    is_new = not found or (again and not keyed)
    if not found:
        found = [str(api.create_run(experiment_id, run_name=name, tags=tags).info.run_id)]
        if again:
            # An earlier request may have been served only now.
            found = _made(api, experiment_id, tags[_KEY]) or found
    for twin in found[1:]:
        with store.passing_over("RESOURCE_DOES_NOT_EXIST"):
            api.delete_run(twin)
    return Made(found[0], experiment_id, is_new)


def _made(api: Any, experiment_id: str, key: str) -> list[str]:
    """The runs that carry this key, oldest first."""
    runs = api.search_runs([experiment_id], f"tags.`{_KEY}` = '{key}'", order_by=["attributes.start_time ASC"])
    return [str(run.info.run_id) for run in runs]


def _experiment_id(uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    api = store.client(uri)
    found = api.get_experiment_by_name(name)
    if found is None:
        path = store.sqlite_path(uri)
        # Beside a local database; a server knows its own place.
        place = None if path is None else (path.resolve().parent / "artifacts").as_uri()
        try:
            return str(api.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = api.get_experiment_by_name(name)  # another job was a moment faster
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment: {name!r} was deleted in {store.shown(uri)}; choose another name, or restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`"
        )
    return str(found.experiment_id)
