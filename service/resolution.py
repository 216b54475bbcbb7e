"""From a model's address to its files on this machine: `models:/NAME@ALIAS`, `runs:/RUN_ID`, a folder or a file."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service import artifact_places, bundle, store
from service.bundle import Card
from service.errors import CheckpointError

if TYPE_CHECKING:
    from service.models import Classifier

# Where a run keeps its bundle.
ARTIFACT = "model"


@dataclass(frozen=True)
class Resolved:
    """A model on this machine's disk.

    Attributes:
        folder: holds model.json and model.safetensors.
        uri: `models:/NAME/VERSION` if it is a registered version, else what was asked for.
        name, version: of the registered model; None for a run's or a folder's.
        run_id: of the run that made it; None if unknown.
    """

    folder: Path
    uri: str
    name: str | None = None
    version: int | None = None
    run_id: str | None = None


def resolve(uri: str, tracking_uri: str | None = None) -> Resolved:
    """Find a model and bring it to this machine.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID[/PATH], a folder, or a file model.safetensors or
            model.json. Artifacts on this machine are used in place; others are kept in `cache_folder()` by content.

    Raises:
        CheckpointError: there is no such model, alias, version, run or file (says which there are), or it is damaged.
        TrackingError: the tracking server does not answer or refuses.
    """
    if uri.startswith(("models:", "runs:")):
        place = tracking_uri or store.default_uri()
        if (path := store.sqlite_path(place)) is not None and not path.exists():
            raise CheckpointError(f"{uri}: nothing was registered yet: there is no {path}; train a model first")
        store.ensure_ready(place)
        with store.explained(place):
            return _from_registry(uri, place) if uri.startswith("models:") else _from_run(uri, place)
    path = Path(uri)
    folder = path if path.is_dir() else path.parent
    if not path.exists() or (path.is_file() and path.name not in (bundle.CARD, bundle.WEIGHTS)):
        problem = "not a model" if path.exists() else "no such model"
        raise CheckpointError(
            f"{uri}: {problem}; write models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID, or "
            f"a folder that holds {bundle.CARD} and {bundle.WEIGHTS}"
        )
    return Resolved(folder, uri, run_id=bundle.read_card(folder).run_id or None)


def load(uri: str, tracking_uri: str | None = None) -> tuple["Classifier", Card, Resolved]:
    """The network with its weights, in eval mode on the CPU; its card; and where it was found.

    Raises:
        CheckpointError: as `resolve`; or the weights are damaged or do not fit the card.
        TrackingError: as `resolve`.
    """
    resolved = resolve(uri, tracking_uri)
    card = bundle.read_card(resolved.folder)
    return bundle.build(card, bundle.read_weights(resolved.folder, card), str(resolved.folder)), card, resolved


def cache_folder() -> Path:
    """Where models from a server are kept: LOROT_CACHE, else lorot/ in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("LOROT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorot"


def _from_registry(uri: str, place: str) -> Resolved:
    match = re.fullmatch(r"models:/+([^/:@]+)(?:@([^/:@]+)|/([0-9]{1,18}))", uri)
    if match is None:
        raise CheckpointError(f"{uri}: write models:/NAME@ALIAS or models:/NAME/VERSION, as in models:/lorot-demo@best")
    name, alias, number = match.groups()
    api = store.client(place)
    found = None
    with store.passing_over("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        found = api.get_model_version_by_alias(name, alias) if alias else api.get_model_version(name, number)
    if found is None:
        raise CheckpointError(_what_exists(api, uri, name, store.shown(place)))
    source = re.fullmatch(r"runs:/+([^/]+)/(.+)", found.source or "")
    if source is None or _leads_elsewhere(source[2]):
        raise CheckpointError(
            f"{uri}: its source {found.source!r} is no run's artifact: not registered by this program"
        )
    folder = _fetch(api, source[1], source[2], uri, place)
    return Resolved(folder, f"models:/{name}/{found.version}", name, int(found.version), found.run_id or source[1])


def _from_run(uri: str, place: str) -> Resolved:
    match = re.fullmatch(r"runs:/+([0-9A-Za-z][0-9A-Za-z_-]{0,255})(?:/(.*?))?/*", uri)
    path = (match[2] if match else None) or ARTIFACT
    if match is None or _leads_elsewhere(path):
        raise CheckpointError(f"{uri}: write runs:/RUN_ID or runs:/RUN_ID/PATH")
    return Resolved(_fetch(store.client(place), match[1], path, uri, place), uri, run_id=match[1])


def _what_exists(api: Any, uri: str, name: str, place: str) -> str:
    names = sorted(model.name for model in store.pages(api.search_registered_models))
    if name not in names:
        known = ", ".join(names) if names else "none yet"
        return f"{uri}: {place} has no registered model {name!r}; registered: {known}"
    versions = sorted(int(version.version) for version in store.versions(api, name))
    aliases = sorted({*api.get_registered_model(name).aliases, *(["latest"] if versions else [])})
    return (
        f"{uri}: {name} has no such version or alias; aliases: {', '.join(aliases) or 'none'}; "
        f"versions: {', '.join(map(str, versions[-20:])) or 'none'}"
    )


def _leads_elsewhere(path: str) -> bool:
    return any(part.strip(".") == "" for part in path.split("/"))


def _fetch(api: Any, run_id: str, path: str, uri: str, place: str) -> Path:
    run = None
    with store.passing_over("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        run = api.get_run(run_id)
    if run is None:
        raise CheckpointError(f"{uri}: there is no run {run_id}")
    try:
        artifact_places.refuse_foreign(f"{run.info.artifact_uri}/{path}", place, artifact_places.given())
    except artifact_places.PlaceError as error:
        raise CheckpointError(f"{uri}: {error}") from None
    root = artifact_places.local_path(run.info.artifact_uri)
    if root is not None:
        folder = root / path
        if not (folder / bundle.CARD).is_file():
            raise CheckpointError(
                f"{uri}: {folder} holds no {bundle.CARD}; was it deleted, or not registered from here?"
            )
        return folder
    return _download(api, run_id, path, uri)


def _download(api: Any, run_id: str, path: str, uri: str) -> Path:
    models = cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".fetching-", dir=models))
    try:
        listed = [item.path for item in api.list_artifacts(run_id, path)]
        if f"{path}/{bundle.CARD}" not in listed:
            raise CheckpointError(
                f"{uri}: run {run_id} has no {path}/{bundle.CARD}; there: {', '.join(listed) or 'nothing'}"
            )
        fetched = Path(api.download_artifacts(run_id, f"{path}/{bundle.CARD}", str(scratch))).parent
        kept = models / hashlib.sha256((fetched / bundle.CARD).read_bytes()).hexdigest()
        if _is_intact(kept):
            return kept
        api.download_artifacts(run_id, f"{path}/{bundle.WEIGHTS}", str(scratch))
        if kept.exists():
            kept.rename(scratch / "damaged")
        # Another process may have been faster; its copy has the same content.
        with contextlib.suppress(OSError):
            fetched.rename(kept)
        return kept
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_intact(folder: Path) -> bool:
    try:
        expected = bundle.read_card(folder).weights_sha256
        with (folder / bundle.WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == expected
    except (OSError, CheckpointError):
        return False
