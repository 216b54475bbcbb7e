"""The tracking database as one file, and back: SQLite by its online backup, PostgreSQL by pg_dump and pg_restore."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from service import store
from service.errors import ConfigError, DataError, StorageError, TrackingError

SQLITE, POSTGRESQL = "sqlite", "postgresql"
# Where MLflow writes down in which folder artifacts lie.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_LOCKED_S = 60.0
_DUMP_S = 6 * 3600.0


def kind_of(uri: str) -> str:
    """ "sqlite" or "postgresql"; raises ConfigError for what cannot be backed up from here."""
    if store.sqlite_path(uri) is not None:
        return SQLITE
    scheme = urllib.parse.urlsplit(uri).scheme.split("+")[0]
    if scheme in ("postgresql", "postgres"):
        return POSTGRESQL
    if scheme in ("http", "https"):
        raise ConfigError(
            f"{store.shown(uri)} is a server, whose database cannot be reached through it; name that with --database, "
            "as in `mlflow server --backend-store-uri`"
        )
    raise ConfigError(
        f"{store.shown(uri)}: only sqlite:///FILE and postgresql://... can be backed up; use its own tool"
    )


def dump(uri: str, target: Path) -> None:
    """Write the database as of one moment to a new file, while others write to it.

    Raises:
        ConfigError: no such database, or a command is missing.
        TrackingError: it does not answer, or is damaged.
        StorageError: the file cannot be written.
    """
    if kind_of(uri) == SQLITE:
        _copy_sqlite(uri, target)
        return
    line = ["pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--file={target}"]
    _run([*line, f"--dbname={without_password(uri)}"], uri, "back up")


def restore(source: Path, kind: str, uri: str) -> None:
    """Fill an empty database from such a file; raises as `dump`, and DataError if the file is not sound.

    Args:
        source: for SQLite it is moved to its place.
        kind: of the database that was dumped.
    """
    if kind_of(uri) != kind:
        raise ConfigError(f"{store.shown(uri)}: the backup is of a {kind} database; name an empty one of that kind")
    if kind == SQLITE:
        path = store.sqlite_path(uri)
        assert path is not None
        _check_sqlite(source, DataError)
        path.parent.mkdir(parents=True, exist_ok=True)
        source.rename(path)
        return
    refuse_if_filled(uri)
    line = ["pg_restore", "--no-owner", "--no-privileges", "--exit-on-error", "--single-transaction"]
    _run([*line, f"--dbname={without_password(uri)}", str(source)], uri, "restore into")


def refuse_if_filled(uri: str) -> None:
    """Raise ConfigError unless nothing is there: no such file, or no tables; TrackingError if it does not answer."""
    if kind_of(uri) == SQLITE:
        path = store.sqlite_path(uri)
        if path is not None and (path.exists() or path.is_symlink()):
            raise ConfigError(f"{path}: is there already and is not overwritten; name a new file")
        return
    with _connected(uri) as (connection, sqlalchemy):
        if tables := sqlalchemy.inspect(connection).get_table_names():
            raise ConfigError(
                f"{store.shown(uri)}: holds {len(tables)} tables already and is not overwritten; "
                "make an empty database with `createdb NAME`"
            )


def locations(uri: str) -> list[str]:
    """Where the experiments and logged models of a database keep artifacts, each once, as MLflow writes it."""
    with _connected(uri) as (connection, sqlalchemy):
        found = []
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            own = f"SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL ORDER BY {column}"
            found += [str(row[0]) for row in connection.execute(sqlalchemy.text(own))]
    # A run's folder lies in its experiment's, unless somebody has moved that since.
    kept: list[str] = []
    for place in sorted(set(found), key=len):
        if not any(place == other or place.startswith(f"{other.rstrip('/')}/") for other in kept):
            kept.append(place)
    return sorted(kept)


def relocate(uri: str, moves: Mapping[str, str]) -> None:
    """Say in the database that artifacts have moved: from each old location, and all below it, to its new one."""
    cases: list[str] = []
    values: dict[str, str | int] = {}
    for number, (old, new) in enumerate(moves.items()):
        old = old.rstrip("/")
        cases.append(
            f"WHEN {{column}} = :old{number} OR substr({{column}}, 1, :length{number} + 1) = :within{number} "
            f"THEN CAST(:new{number} AS TEXT) || substr({{column}}, :length{number} + 1)"
        )
        values |= {f"old{number}": old, f"within{number}": f"{old}/", f"new{number}": new.rstrip("/")}
        values |= {f"length{number}": len(old)}
    if not cases:
        return
    with _connected(uri) as (connection, sqlalchemy):
        known = sqlalchemy.inspect(connection)
        tables = set(known.get_table_names())
        for table, column in _PLACES:
            if table in tables and column in {entry["name"] for entry in known.get_columns(table)}:
                # All moves at once: what one has moved is no other's to move again.
                choice = " ".join(cases).format(column=column)
                change = f"UPDATE {table} SET {column} = CASE {choice} ELSE {column} END WHERE {column} IS NOT NULL"
                connection.execute(sqlalchemy.text(change), values)


@contextlib.contextmanager
def _connected(uri: str) -> Iterator[tuple[Any, Any]]:
    """A transaction, and the library it is made with."""
    with store.explained(uri):
        import sqlalchemy

        engine = sqlalchemy.create_engine(with_driver(store.absolute(uri)))
        try:
            with engine.begin() as connection:
                yield connection, sqlalchemy
        finally:
            engine.dispose()


def with_driver(uri: str) -> str:
    """An address of libpq as SQLAlchemy and MLflow take it: with psycopg2, where no driver is named."""
    scheme, separator, rest = uri.partition("://")
    return f"postgresql+psycopg2://{rest}" if separator and scheme in ("postgresql", "postgres") else uri


def _copy_sqlite(uri: str, target: Path) -> None:
    path = store.sqlite_path(uri)
    assert path is not None
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such database; name the tracking database with --database")
    try:
        with (
            contextlib.closing(store.open_sqlite(path, _LOCKED_S)) as source,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            # In one go: in parts it would begin anew whenever somebody writes in between.
            source.backup(copy, pages=-1)
            # One file, without a log beside it.
            copy.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        if "disk is full" in str(error) or "disk I/O" in str(error):
            raise StorageError(f"{target}: the database's copy cannot be written ({error})") from None
        raise TrackingError(f"{path}: cannot be read ({error})") from None
    _check_sqlite(target, TrackingError)


def _check_sqlite(path: Path, kind: type[TrackingError] | type[DataError]) -> None:
    try:
        with contextlib.closing(store.open_sqlite(path, _LOCKED_S)) as database:
            (said,) = database.execute("PRAGMA integrity_check(1)").fetchone()
            database.execute("SELECT count(*) FROM experiments").fetchone()
    except sqlite3.Error as error:
        said = str(error)
    if said != "ok":
        raise kind(f"{path}: the database is damaged, or none of MLflow ({said})")


def without_password(uri: str) -> str:
    """As libpq reads it, without the password, which every user of the machine could see in a list of processes."""
    parts = urllib.parse.urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    return urllib.parse.urlunsplit(parts._replace(scheme="postgresql", netloc=f"{user.partition(':')[0]}{at}{host}"))


def _run(line: Sequence[str], uri: str, what: str) -> None:
    program = shutil.which(line[0])
    if program is None:
        raise ConfigError(
            f"{line[0]} is not installed here, and to {what} PostgreSQL takes it; "
            "on Debian: apt-get install postgresql-client"
        )
    environment = dict(os.environ)
    if password := urllib.parse.urlsplit(uri).password:
        environment["PGPASSWORD"] = urllib.parse.unquote(password)
    try:
        done = subprocess.run(
            [program, *line[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_DUMP_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TrackingError(f"{store.shown(uri)}: {line[0]} was not done within {_DUMP_S / 3600:.0f} hours") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[-600:]
        raise TrackingError(f"cannot {what} {store.shown(uri)}: {said}")
