"""Making a run in MLflow: one, even if the server's answer is lost and the question has to be put again."""

import contextlib
import getpass
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from service import artifact_places, provenance, store
from service.errors import TrackingError

# By this tag a run is found again whose creation was never answered.
_KEY = "lorot.key"
_KEY_TEXT = re.compile(r"[A-Za-z0-9%._~/-]+")
_ATTEMPTS = 8
_LONGEST_S = 60.0
# What a run's tags say: whether it has begun, and whether anybody was told of it.
Rank = Callable[[Mapping[str, str]], tuple[bool, bool]]


@dataclass(frozen=True)
class Made:
    """A run that there is now.

    Attributes:
        experiment_id: where it is, if it is new.
        key: that it is found again by.
        is_new: this made it, and not an earlier question with the same key.
        is_alone: no question was put twice; else the server may serve an unanswered one later, and make a twin.
    """

    run_id: str
    experiment_id: str
    key: str
    is_new: bool
    is_alone: bool


@dataclass(frozen=True)
class Sorted:
    """The runs of one key.

    Attributes:
        kept: the one that stays, if there is any.
        spare: the others that have not begun; they are deleted.
        refusal: why one of those could not be.
    """

    kept: str | None
    spare: tuple[str, ...]
    refusal: TrackingError | None


def is_key(text: str) -> bool:
    """Whether this can be a run's key. Anybody can write into a tag what would break a question for it."""
    return _KEY_TEXT.fullmatch(text) is not None


def create_run(uri: str, experiment: str, name: str) -> str:
    """Start a run; returns its id. A server that stumbles is asked again for some seconds.

    Raises:
        TrackingError: the server does not answer, or refuses.
    """
    return create(uri, experiment, name).run_id


def sort_out(uri: str, key: str, rank: Rank, told: str = "") -> Sorted:
    """Which run of this key stays, if there is any, and which others are deleted for it.

    A server may serve a question that was put again twice, the first one late: then that one is the earlier. What has
    begun is never deleted, and stays before what somebody was told of, that before the earliest.

    Args:
        told: a run that somebody was told of, whatever its tags say.

    Raises:
        TrackingError: the server does not answer, or refuses to look.
    """
    if not is_key(key):
        raise TrackingError(f"{key!r} is no key of a run; it has other characters than letters, digits and %-._~/")
    with store.explained(uri):
        api = store.client(uri)
        # A client's key may have been used with another experiment.
        experiments = [str(one.experiment_id) for one in store.pages(api.search_experiments)]
        asked = {"filter_string": f"tags.`{_KEY}` = '{key}'", "order_by": ["attributes.start_time ASC"]}
        runs = api.search_runs(experiments, **asked) if experiments else []
        twins = {str(run.info.run_id): rank(run.data.tags) for run in runs}
    if told in twins:
        twins[told] = (twins[told][0], True)
    kept = max(twins, key=lambda run_id: twins[run_id], default=None)
    spare = tuple(run_id for run_id, (has_begun, _) in twins.items() if run_id != kept and not has_begun)
    refusal = None
    for run_id in spare:
        try:
            with store.explained(uri), store.passing_over("RESOURCE_DOES_NOT_EXIST"):
                api.delete_run(run_id)
        except store.UnreachableError:
            raise
        except TrackingError as error:
            refusal = error
    return Sorted(kept, spare, refusal)


def create(
    uri: str,
    experiment: str,
    name: str,
    *,
    tags: Mapping[str, str] = MappingProxyType({}),
    key: str | None = None,
    is_own: bool = False,
    rank: Rank = lambda tags: (False, False),
    roots: artifact_places.Roots | None = None,
) -> Made:
    """As `create_run`, with further tags.

    Args:
        key: one run in all for each such text, of letters, digits and `%-._~/`, however often it is asked for; None:
            a new run. Who asks at the same time as somebody else has to take turns with them.
        is_own: nobody has used the key before or does so now; it is not looked for.
        rank: see `sort_out`.
        roots: where else artifacts may lie; None: wherever the experiment says.

    Raises:
        PlaceError: the experiment keeps artifacts where they may not be.
        UnreachableError: the server has not answered; it may still make the run.
        TrackingError: it refuses, and there is no run.
    """
    store.ensure_ready(uri)
    own = {"mlflow.source.name": "lorot", "mlflow.source.type": "LOCAL", _KEY: key or uuid.uuid4().hex}
    with contextlib.suppress(Exception):  # a container's user may have no name
        own["mlflow.user"] = getpass.getuser()
    if commit := provenance.code_version().get("git.commit"):
        own["mlflow.source.git.commit"] = commit
    own = {**tags, **own}
    began = time.monotonic()
    for attempt in range(_ATTEMPTS):
        try:
            with store.explained(uri):
                place = _experiment_id(uri, experiment, roots)
                return _create_once(uri, place, name, own, rank, keyed=bool(key) and not is_own, again=attempt > 0)
        except store.UnreachableError:
            if attempt == _ATTEMPTS - 1 or time.monotonic() - began > _LONGEST_S:
                raise
            time.sleep(min(4.0, 0.5 * 2.0**attempt))
        except TrackingError as error:
            if attempt == 0:
                raise
            # The question before this one may still be served.
            raise store.UnreachableError(f"{error}; before, it did not answer") from error
    raise AssertionError("the last attempt returns or raises")


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set up to a hundred tags of a run in one request: all or none; raises TrackingError."""
    with store.explained(uri):
        from mlflow.entities import RunTag

        store.client(uri).log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def _create_once(
    uri: str, experiment_id: str, name: str, tags: dict[str, str], rank: Rank, *, keyed: bool, again: bool
) -> Made:
    kept = sort_out(uri, tags[_KEY], rank).kept if again or keyed else None
    if kept is not None:
        # After a lost answer nobody knows who has made it; it is this question's own if the key is.
        return Made(kept, experiment_id, tags[_KEY], is_new=not keyed, is_alone=not again)
    own = str(store.client(uri).create_run(experiment_id, run_name=name, tags=tags).info.run_id)
    # An earlier request may have been served only now.
    kept = (sort_out(uri, tags[_KEY], rank).kept if again else None) or own
    return Made(kept, experiment_id, tags[_KEY], is_new=not keyed or kept == own, is_alone=not again)


def _experiment_id(uri: str, name: str, roots: artifact_places.Roots | None) -> str:
    from mlflow.exceptions import MlflowException

    api = store.client(uri)
    found = api.get_experiment_by_name(name)
    if found is None:
        path = store.sqlite_path(uri)
        # Beside a local database; a server knows its own place.
        place = None if path is None else (path.resolve().parent / "artifacts").as_uri()
        try:
            api.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another job was a moment faster
                raise
        found = api.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment: {name!r} was deleted in {store.shown(uri)}; choose another name, or restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`"
        )
    try:
        artifact_places.refuse_foreign(found.artifact_location, uri, roots)
    except artifact_places.PlaceError as error:
        raise artifact_places.PlaceError(f"experiment: {name!r} keeps {error}") from None
    return str(found.experiment_id)
