"""One archive of all that the job service knows: the tracking database, artifacts, tokens, settings, and job folders.

The database is taken first, as of one moment. Whatever it speaks of was written before that, so the files that are read
afterwards hold all of it, and at most something more. Nothing has to be stopped.
"""

import os
import urllib.parse
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from service import artifact_places, provenance, store
from service.artifact_places import Roots
from service.errors import ConfigError, StorageError, TrackingError
from service.jobs.settings import ServiceSettings
from service.operations import archive, database
from service.operations.archive import Manifest, Writer
from service.operations.objects import SCHEME, Objects, TornError

SETTINGS = "settings.yaml"
STATE = "state"
JOBS = "jobs"
ARTIFACTS = "artifacts"
# Where a running service notes that it is there, and what signs the sessions of browsers, who then log in anew.
_OF_NOW = ("service.json", "session.key", "session.closed")
# Where in an archive a tracking server's own artifacts are.
SERVER = f"{ARTIFACTS}/server"
# How often an object is read that does not come whole.
_TRIES = 4
DATABASES = {database.SQLITE: "database/mlflow.db", database.POSTGRESQL: "database/postgresql.dump"}


def back_up(
    settings: ServiceSettings,
    target: Path,
    *,
    database_uri: str | None = None,
    artifacts: str | Path | None = None,
    with_artifacts: bool = True,
    with_jobs: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Path:
    """Write an archive, whole or not at all; returns where it is.

    Args:
        settings: the service's.
        target: a new file, or a folder that is there: it gets a file named by the time, UTC.
        database_uri: of the tracking database; None: `settings.tracking_uri`, unless that is a server.
        artifacts: folder of the tracking server's artifacts, or s3://BUCKET/FOLDER; None: none of a server. Folders of
            this machine that the database names are taken where `service.artifact_places` allows them.
        with_artifacts: put artifacts in, registered models among them.
        with_jobs: put the folders of jobs in: checkpoints, logs. Without them a job begins anew after a restore.
        say: is told what is being done, in a few words.

    Raises:
        ConfigError: the target is there already, no database can be reached, a folder, bucket or command is missing.
        TrackingError: the database does not answer or is damaged, so the object store.
        StorageError: the archive cannot be written.
    """
    uri = database_uri or settings.tracking_uri or store.default_uri()
    kind = database.kind_of(uri)
    stored = _stored(artifacts)
    made = datetime.now(UTC)
    if target.is_dir():
        target = target / f"lorot-{made:%Y%m%d-%H%M%S}.tar"
    try:
        with archive.writing(target) as writer:
            say(f"database: {store.shown(uri)}")
            dumped = writer.scratch / "dumped"
            database.dump(uri, dumped)
            writer.add_file(dumped, DATABASES[kind])
            facts: dict[str, Any] = {
                "made": made.isoformat(timespec="seconds"),
                "lorot": provenance.code_version(),
                "database": kind,
                "jobs": with_jobs,
            }
            writer.add_text(yaml.safe_dump(_portable(settings), sort_keys=False), SETTINGS)
            if settings.state.is_dir():
                say(f"tokens and the service's own files: {settings.state}")
                writer.add_tree(settings.state, STATE, wanted=_is_state)
            # Of the copy, where that can be asked: an experiment may have come since.
            known = database.locations(f"sqlite:///{dumped}" if kind == database.SQLITE else uri)
            facts["served"] = _is_served(settings, known)
            roots = artifact_places.absolute(settings.artifact_roots)
            folder_of = partial(local_folder, uri=uri, roots=roots)
            facts |= _add_artifacts(writer, known, stored, with_artifacts, _omitted(settings, uri), say, folder_of)
            if with_jobs and settings.results.is_dir():
                say(f"job folders: {settings.results}")
                writer.add_tree(settings.results, JOBS, wanted=lambda name: not name.startswith("."))
            manifest = writer.finish(facts)
    except OSError as error:
        raise StorageError(f"{target}: the archive cannot be made ({error.strerror or error})") from None
    _tell(manifest, writer.left_out, target, say)
    return target


def local_folder(location: str, uri: str, roots: Roots) -> Path | None:
    """The folder of this machine that an artifact location names; None for a server's or an object store's.

    Raises:
        PlaceError: whoever could speak to MLflow may have named it.
    """
    path = artifact_places.local_path(location)
    if path is None or not path.is_absolute():
        return None
    artifact_places.refuse_foreign(location, uri, roots)
    return path


def _add_artifacts(
    writer: Writer,
    known: list[str],
    stored: Path | Objects | None,
    wanted: bool,
    omit: set[Path],
    say: Callable[[str], object],
    folder_of: Callable[[str], Path | None],
) -> dict[str, Any]:
    """Put them in; returns what the manifest says of it: by location the folder in the archive, and what is not in."""
    places: dict[str, str] = {}
    elsewhere = []
    for location in known:
        own = None
        try:
            own = folder_of(location)
        except artifact_places.PlaceError as error:
            say(f"left out: {error}")
        if not wanted or own is None:
            elsewhere.append(location)
        elif own.is_dir():
            places[location] = f"{ARTIFACTS}/{len(places)}"
            say(f"artifacts: {own}")
            writer.add_tree(own, places[location], omit=omit)
    server = address = None
    if wanted and stored is not None:
        server = SERVER
        within = ["mlflow-artifacts:"]
        if isinstance(stored, Objects):
            address = stored.address
            within.append(f"{address}/")
            say(f"artifacts: {address}")
            _add_objects(writer, stored)
        else:
            say(f"artifacts: {stored}")
            writer.add_tree(stored, server, omit=omit)
        elsewhere = [place for place in elsewhere if not f"{place}/".startswith(tuple(within))]
    return {"artifacts": places, "server_artifacts": server, "server_location": address, "elsewhere": elsewhere}


def _is_served(settings: ServiceSettings, known: list[str]) -> bool:
    """Whether the service speaks to a tracking server, and not to its database."""
    if spoken := settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return spoken.startswith(("http://", "https://"))
    return any(place.startswith("mlflow-artifacts:") for place in known)


def _stored(artifacts: str | Path | None) -> Path | Objects | None:
    """What holds a tracking server's artifacts; raises ConfigError if it is not there."""
    if artifacts is None:
        return None
    if str(artifacts).startswith(SCHEME):
        return Objects(str(artifacts))
    folder = Path(artifacts)
    if not folder.is_dir():
        raise ConfigError(
            f"{artifacts}: no folder of artifacts; name the server's --artifacts-destination, a folder or "
            "s3://BUCKET/FOLDER, or leave artifacts out with --without-artifacts as long as there are none"
        )
    return folder


def _add_objects(writer: Writer, objects: Objects) -> None:
    """Every object; what is deleted meanwhile is passed over, as a file would be."""
    names, strange = objects.names()
    if not names:
        raise ConfigError(
            f"{objects.address}: nothing lies there; name the tracking server's --artifacts-destination, or leave "
            "artifacts out with --without-artifacts as long as there are none"
        )
    writer.left_out += [f"{objects.address}/{name}" for name in strange]
    for name in names:
        for again in reversed(range(_TRIES)):
            try:
                with objects.reading(name) as content:
                    if content is not None:
                        own = f"{SERVER}/{name}"
                        writer.add_stream(content.source, content.num_bytes, own, content.modified_s)
                break
            except TornError as error:
                if not again:
                    raise TrackingError(f"{objects.address}/{name}: cannot be read whole ({error})") from None


def _tell(manifest: Manifest, left_out: list[str], target: Path, say: Callable[[str], object]) -> None:
    for path in left_out[:10]:
        say(f"left out, as it is no regular file: {path}")
    if len(left_out) > 10:
        say(f"left out, as they are no regular files: {len(left_out) - 10} more")
    if not manifest.facts["server_artifacts"] and not manifest.facts["artifacts"]:
        say("no artifacts are in it, so no registered models either")
    for location in manifest.facts["elsewhere"]:
        say(f"not in it: artifacts in {store.shown(location)}; they need a backup of their own")
    say(f"{target}: {len(manifest.files)} files, {manifest.num_bytes / 1e6:.1f} MB")


def _portable(settings: ServiceSettings) -> Mapping[str, Any]:
    """As data, with absolute paths, and without the passwords that addresses may hold."""
    content = settings.model_dump(mode="json", exclude_unset=True)
    for name in ("state", "results", "secrets"):
        if (path := getattr(settings, name)) is not None:
            content[name] = str(path.resolve())
    for name in ("data_roots", "mounts"):
        content[name] = [str(path.resolve()) for path in getattr(settings, name)]
    content["artifact_roots"] = list(artifact_places.absolute(settings.artifact_roots))
    for name in ("tracking_uri", "worker_tracking_uri", "browser_tracking_uri"):
        uri = getattr(settings, name)
        if uri is None or urllib.parse.urlsplit(uri).password:
            # From MLFLOW_TRACKING_URI, which has the password.
            content.pop(name, None)
        else:
            content[name] = store.absolute(uri)
    return content


def _omitted(settings: ServiceSettings, uri: str) -> set[Path]:
    """What may lie in a folder of artifacts and is none."""
    found = {settings.state.resolve(), settings.results.resolve()}
    if (path := store.sqlite_path(uri)) is not None:
        path = path.resolve()
        found |= {path.with_name(path.name + end) for end in ("", "-wal", "-shm", "-journal")}
        found.add(path.with_name(f".{path.name}.lock"))
    return found


def _is_state(name: str) -> bool:
    """Not what says that a service runs, nor what one was about to write."""
    return not name.startswith(".") and not name.endswith((".lock", ".pid", ".sock")) and name not in _OF_NOW
