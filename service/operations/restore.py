"""From an archive of `service.operations.backup` to a service's files, in a folder that was not there before.

FOLDER/service.yaml    the settings of then, with the places of now
FOLDER/mlflow.db       the tracking database, if it was SQLite
FOLDER/state/          tokens, audit log
FOLDER/artifacts/N/    registered models and other artifacts; server/: of a tracking server, unless a store gets them
FOLDER/jobs/           job folders, if they were put in
"""

import contextlib
import shutil
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from service import scratch_folder, store
from service.errors import ConfigError, DataError, StorageError, TrackingError
from service.jobs.settings import ServiceSettings, complete
from service.operations import archive, backup, database
from service.operations.archive import Reader
from service.operations.objects import SCHEME, Objects
from service.whole_file import flush

SETTINGS = "service.yaml"
DATABASE = "mlflow.db"
# Room that is left beside what the archive holds.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Restored:
    """What came back.

    Attributes:
        settings: file to start the service with.
        names_tracking: whether the settings say where the record is; else MLFLOW_TRACKING_URI has to.
        database_uri: of the tracking database, without a password.
        server_artifacts: for the tracking server's --artifacts-destination, a folder or s3://BUCKET/FOLDER; None if
            there were none in the archive.
        num_files, num_bytes: of the archive.
    """

    settings: Path
    names_tracking: bool
    database_uri: str
    server_artifacts: Path | str | None
    num_files: int
    num_bytes: int


def restore(
    source: Path,
    folder: Path,
    *,
    database_uri: str | None = None,
    artifacts: str | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Restored:
    """Check every byte of an archive, then put it into a folder, which appears whole or not at all.

    Args:
        source: the archive.
        folder: is not there yet, or empty.
        database_uri: of an empty PostgreSQL database, if the archive holds one; None: FOLDER/mlflow.db.
        artifacts: s3://BUCKET/FOLDER, empty, for those of a tracking server; None: FOLDER/artifacts/server.
        say: is told what is being done, in a few words.

    Raises:
        ConfigError: something is there already, or the database's address is missing, or a bucket.
        DataError: the archive is damaged, or holds what no backup does; a store returns other than it was given.
        TrackingError: the database or the object store does not answer or refuses.
        StorageError: the folder cannot be written.
    """
    folder = folder.absolute()
    with archive.reading(source) as reader:
        kind = _kind(reader)
        uri = _check_targets(folder, kind, database_uri)
        objects = _check_store(reader, artifacts)
        say(f"checking {len(reader.manifest.files)} files, {reader.manifest.num_bytes / 1e6:.1f} MB")
        reader.verify()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            num_bytes = sum(
                int(own["bytes"]) for name, own in reader.manifest.files.items() if not _goes(name, objects)
            )
            if shutil.disk_usage(folder.parent).free < num_bytes + _SPARE_BYTES:
                raise StorageError(f"{folder}: too little room for {num_bytes / 1e6:.0f} MB; choose another disk")
            with (
                scratch_folder.made(folder.parent, f".{folder.name}.restoring-") as scratch,
                _uploaded(reader, objects, say),
            ):
                whole = scratch / "whole"
                whole.mkdir()
                names_tracking = _fill(reader, whole, folder, kind, uri, objects, say)
                if folder.is_dir():
                    folder.rmdir()
                whole.rename(folder)
                flush(folder.parent)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be written ({error.strerror or error})") from None
        manifest = reader.manifest
        server = _server(reader, folder, objects)
        return Restored(
            folder / SETTINGS,
            names_tracking,
            database.with_driver(database.without_password(uri)) if kind == database.POSTGRESQL else uri,
            server,
            num_files=len(manifest.files),
            num_bytes=manifest.num_bytes,
        )


def _kind(reader: Reader) -> str:
    facts = reader.manifest.facts
    kind = facts.get("database")
    places = facts.get("artifacts")
    server, address = facts.get("server_artifacts"), facts.get("server_location")
    is_sound = (
        kind in backup.DATABASES
        and backup.DATABASES[kind] in reader.manifest.files
        and isinstance(places, dict)
        and all(
            isinstance(own, str) and own == f"{backup.ARTIFACTS}/{number}" for number, own in enumerate(places.values())
        )
        and server in (None, backup.SERVER)
        and (address is None or (isinstance(address, str) and address.startswith(SCHEME)))
    )
    if not is_sound:
        raise DataError(f"{reader.path}: its manifest is not as `lorot backup` writes it")
    return str(kind)


def _check_targets(folder: Path, kind: str, database_uri: str | None) -> str:
    """The address of the database to fill; nothing that is there is written over."""
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConfigError(f"{folder}: is there already and is not overwritten; name a new or an empty folder")
    if kind == database.SQLITE:
        if database_uri is not None:
            raise ConfigError(f"--database: the backup is of SQLite and becomes {folder / DATABASE}; leave it away")
        return f"sqlite:///{folder / DATABASE}"
    if database_uri is None:
        raise ConfigError("the backup is of PostgreSQL: name an empty database, as --database postgresql://HOST/NAME")
    if database.kind_of(database_uri) != kind:
        raise ConfigError(f"--database: the backup is of PostgreSQL, {store.shown(database_uri)} is not")
    database.refuse_if_filled(database_uri)
    return database_uri


def _check_store(reader: Reader, artifacts: str | None) -> Objects | None:
    """Where a tracking server's artifacts go, if not into the folder."""
    if artifacts is None:
        return None
    if reader.manifest.facts.get("server_artifacts") is None:
        raise ConfigError("--artifacts: the backup holds no artifacts of a tracking server; leave it away")
    objects = Objects(artifacts)
    objects.refuse_if_filled()
    return objects


def _goes(name: str, objects: Objects | None) -> bool:
    """Whether a file of the archive goes to the object store."""
    return objects is not None and name.startswith(f"{backup.SERVER}/")


def _server(reader: Reader, folder: Path, objects: Objects | None) -> Path | str | None:
    if objects is not None:
        return objects.address
    return folder / backup.SERVER if reader.manifest.facts.get("server_artifacts") else None


@contextlib.contextmanager
def _uploaded(reader: Reader, objects: Objects | None, say: Callable[[str], object]) -> Iterator[None]:
    """The store's part is there; if that or what follows fails it is emptied again."""
    if objects is None:
        yield
        return
    names = reader.manifest.below(backup.SERVER)
    say(f"artifacts: {objects.address}, {len(names)} objects, each read back")
    begun: list[str] = []
    try:
        for name in names:
            begun.append(name.removeprefix(f"{backup.SERVER}/"))
            objects.write(begun[-1], reader.stream(name), str(reader.manifest.files[name]["sha256"]))
        yield
    except BaseException:
        try:
            objects.remove(begun)
        except TrackingError as error:
            say(f"what was written to the store could not be removed: {error}")
        raise


def _fill(
    reader: Reader,
    scratch: Path,
    folder: Path,
    kind: str,
    uri: str,
    objects: Objects | None,
    say: Callable[[str], object],
) -> bool:
    """Returns whether the settings name the place of the record."""
    facts = reader.manifest.facts
    for part in (backup.STATE, backup.ARTIFACTS, backup.JOBS):
        for name in (name for name in reader.manifest.below(part) if not _goes(name, objects)):
            reader.extract(name, scratch / name, 0o600 if part == backup.STATE else 0o666)
    if (scratch / backup.STATE).exists():
        (scratch / backup.STATE).chmod(0o700)
    names_tracking = _write_settings(reader, scratch, folder, uri)
    moves = {location: _as_written(location, folder / own) for location, own in facts["artifacts"].items()}
    if (before := facts.get("server_location")) is not None:
        # Where MLflow speaks to the store itself, and not through its server.
        moves[before] = str(_server(reader, folder, objects))
    dumped = scratch / ".database"
    reader.extract(backup.DATABASES[kind], dumped, 0o600)
    say(f"database: {store.shown(uri)}")
    if kind == database.SQLITE:
        own = f"sqlite:///{scratch / DATABASE}"
        database.restore(dumped, kind, own)
        database.relocate(own, moves)
    else:
        database.restore(dumped, kind, uri)
        try:
            database.relocate(uri, moves)
        except BaseException:
            say(f"{store.shown(uri)} has been filled already; make it anew before the next try")
            raise
        dumped.unlink()
    return names_tracking


def _write_settings(reader: Reader, scratch: Path, folder: Path, uri: str) -> bool:
    try:
        content = yaml.safe_load(reader.text(backup.SETTINGS)) if backup.SETTINGS in reader.manifest.files else {}
        before = complete().model_validate(content)
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{reader.path}: its {backup.SETTINGS} cannot be read: {error}") from None
    content = {**content, **_places(reader, before, folder, uri)}
    for name, value in list(content.items()):
        if value is None:
            del content[name]
    (scratch / SETTINGS).write_text(yaml.safe_dump(content, sort_keys=False))
    return "tracking_uri" in content


def _places(reader: Reader, before: ServiceSettings, folder: Path, uri: str) -> Mapping[str, Any]:
    """The settings that have moved."""
    found: dict[str, Any] = {"state": str(folder / backup.STATE)}
    if reader.manifest.facts.get("jobs"):
        # Else they are where they were, if this is that machine.
        found["results"] = str(folder / backup.JOBS)
    facts = reader.manifest.facts
    if facts["artifacts"] and store.sqlite_path(uri) is None:
        # Beside a sqlite database they need no mention.
        found["artifact_roots"] = [*before.artifact_roots, str(folder / backup.ARTIFACTS)]
    # Archives of before there was "served": only a server has a folder of its own in them.
    served = facts.get("served", bool(facts.get("server_artifacts")) and not facts.get("server_location"))
    if before.tracking_uri is None and served:
        # MLFLOW_TRACKING_URI named the server; the database behind it would not give out its artifacts.
        return found
    if before.tracking_uri is None or not before.tracking_uri.startswith(("http://", "https://")):
        # A password belongs in MLFLOW_TRACKING_URI, not in a file.
        found["tracking_uri"] = None if urllib.parse.urlsplit(uri).password else database.with_driver(uri)
    return found


def _as_written(location: str, folder: Path) -> str:
    """The new place in the way of the old one: MLflow has plain paths and file: addresses."""
    return folder.as_uri() if location.startswith("file:") else str(folder)
