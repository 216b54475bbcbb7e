"""Where MLflow keeps its records: finding the place, getting it ready once, and saying plainly when it does not answer.

MLflow is imported on first use (it takes seconds), with its messages routed into `logging`, not to the terminal.
"""

import contextlib
import fcntl
import logging
import os
import re
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from service import scratch_folder
from service.errors import TrackingError
from service.whole_file import flush

DEFAULT_URI = "sqlite:///mlruns/mlflow.db"
_PROBE_S = 4.0
# How long another program's lock on a SQLite file is waited for.
_LOCKED_S = 20.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_ADVICE = "start the server, correct tracking.uri or MLFLOW_TRACKING_URI, or unset it to record in " + DEFAULT_URI
# What the user has set stays. A request is tried once: the caller decides whether repeating it is safe.
_ENVIRONMENT = {
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_PRINT_MODEL_URLS_ON_CREATION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "GIT_PYTHON_REFRESH": "quiet",
}


_T = TypeVar("_T")


class UnreachableError(TrackingError):
    """Nothing answers at the tracking URI."""


def default_uri() -> str:
    """MLFLOW_TRACKING_URI if it is set, else a SQLite file in ./mlruns."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def client(uri: str | None = None) -> Any:
    """An `MlflowClient` for runs and registry at `uri` (default: `default_uri()`). Contacts no server."""
    uri = uri or default_uri()
    with explained(uri):
        # MLflow keeps one connection for each address it was given: a relative one would outlive a change of folder.
        return _mlflow().MlflowClient(tracking_uri=absolute(uri), registry_uri=absolute(uri))


def ensure_ready(uri: str | None = None, patience_s: float | None = None) -> None:
    """Create a SQLite database that does not exist yet, whole or not at all; make sure that a server answers.

    Args:
        patience_s: for an answer; None: four seconds.

    Raises:
        UnreachableError: no answer within that.
        TrackingError: the server refuses, the database cannot be created or is none, the URI is of no known kind.
    """
    uri = uri or default_uri()
    patience_s = patience_s or _PROBE_S
    path = sqlite_path(uri)
    if path is not None:
        _ensure_database(uri, path)
        return
    parts = urllib.parse.urlsplit(uri)
    scheme = parts.scheme.split("+")[0]
    if scheme in ("http", "https"):
        _ask_server(uri, patience_s)
    elif scheme in _PORTS:
        try:
            socket.create_connection((parts.hostname or "localhost", parts.port or _PORTS[scheme]), patience_s).close()
        except (OSError, ValueError) as error:
            raise UnreachableError(f"{shown(uri)} does not answer ({_reason(error)}); {_ADVICE}") from None
    elif scheme not in ("databricks", "databricks-uc"):
        raise TrackingError(
            f"tracking URI {shown(uri)!r} is of no supported kind; use sqlite:///FILE, http(s)://HOST:PORT or postgresql+psycopg2://..."
        )


def retry_after_s(uri: str) -> float | None:
    """How long a server that is too busy asks to be left alone, seconds; None if it does not say."""
    if not uri.startswith(("http://", "https://")):
        return None
    try:
        with urllib.request.urlopen(f"{shown(uri).rstrip('/')}/health", timeout=_PROBE_S):
            return None
    except urllib.error.HTTPError as error:
        said = error.headers.get("Retry-After", "").strip()
        with contextlib.suppress(ValueError):
            return max(0.0, float(said))
        with contextlib.suppress(ValueError, TypeError):
            return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (OSError, ValueError):
        pass
    return None


def sqlite_path(uri: str) -> Path | None:
    """The file of a `sqlite:///FILE` URI (relative to the working folder; four slashes for an absolute path)."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").split("?")[0])


def absolute(uri: str) -> str:
    """`uri`, independent of the working folder."""
    path = sqlite_path(uri)
    if path is None:
        return uri
    _, question_mark, options = uri.partition("?")
    return f"sqlite:///{path.resolve()}{question_mark}{options}"


def shown(uri: str) -> str:
    """`uri` without the user and password it may hold."""
    parts = urllib.parse.urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what MLflow and the network raise into a TrackingError that names `uri`."""
    try:
        yield
    except TrackingError:
        raise
    except ModuleNotFoundError as error:
        if error.name not in ("psycopg", "psycopg2"):
            raise
        raise TrackingError(
            f"{shown(uri)} takes a driver: pip install psycopg2-binary, and write postgresql+psycopg2:// as its scheme"
        ) from error
    except Exception as error:
        foreign = type(error).__module__.startswith(("mlflow", "sqlalchemy", "requests", "urllib3"))
        if not foreign and not isinstance(error, OSError):
            raise
        text = " ".join(str(error).split())
        if _is_transient(error, text):
            raise UnreachableError(f"{shown(uri)} does not answer ({text[:300]}); {_ADVICE}") from error
        if "out-of-date database schema" in text:
            raise TrackingError(
                f"{shown(uri)} is of another version of MLflow; back it up, then run `mlflow db upgrade {shown(uri)}`"
            ) from error
        raise TrackingError(f"{shown(uri)} refuses: {text[:600]}") from error


def within(timeout_s: float, ask: Callable[[], _T]) -> _T:
    """What `ask` returns or raises; TimeoutError when that takes longer, and its answer is forgotten."""
    answers: list[_T] = []
    failures: list[Exception] = []

    def work() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            failures.append(error)

    asking = threading.Thread(target=work, name="lorot-question", daemon=True)
    asking.start()
    asking.join(timeout_s)
    if failures:
        raise failures[0]
    if not answers:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return answers[0]


def versions(api: Any, name: str) -> list[Any]:
    """Every version of a registered model."""
    quote = '"' if "'" in name else "'"
    return list(pages(api.search_model_versions, filter_string=f"name={quote}{name}{quote}"))


def pages(search: Any, **arguments: Any) -> Iterator[Any]:
    """All entries of one of the client's paged searches."""
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def view(stages: str) -> int:
    """MLflow's number for what a search looks at: "all", or "deleted_only"."""
    _mlflow()
    from mlflow.entities import ViewType

    return int(ViewType.from_string(stages))


@contextlib.contextmanager
def passing_over(*codes: str) -> Iterator[None]:
    """Pass over an MLflow error with one of these codes."""
    try:
        yield
    except Exception as error:
        if getattr(error, "error_code", None) not in codes:
            raise


def _mlflow() -> Any:
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow

    for name in ("mlflow", "alembic", "sqlalchemy", "huey"):
        logger = logging.getLogger(name)
        # Without a handler of its own, a warning would reach the terminal through logging's last resort.
        logger.handlers = [logging.NullHandler()]
        logger.propagate = True
    return mlflow


def _is_transient(error: Exception, text: str) -> bool:
    """Whether trying again may help: no connection, or a server that says it is busy or broken."""
    if getattr(error, "error_code", None) in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):
        return True
    status = re.search(r"API request to .* failed with error code (\d+)", text)
    if status:
        return status[1] == "429" or status[1].startswith("5")
    return "API request to" in text and "failed with" in text


def _ask_server(uri: str, patience_s: float) -> None:
    base = shown(uri).rstrip("/")
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=patience_s):
            return
    except urllib.error.HTTPError as error:
        if error.code == 403:
            raise TrackingError(
                f"{base} refuses this address (403); start it with `mlflow server --allowed-hosts` naming the host"
            ) from None
        if error.code in (502, 503, 504):
            raise UnreachableError(f"{base} does not answer: its gateway says {error.code}; {_ADVICE}") from None
        # Anything else is a living server; whether it is MLflow and lets us in shows at the first request.
    except (OSError, ValueError) as error:
        raise UnreachableError(f"{base} does not answer ({_reason(error)}); {_ADVICE}") from None


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return "timed out" if isinstance(cause, TimeoutError) else str(getattr(cause, "strerror", None) or cause)


def _ensure_database(uri: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_database(uri, path):
            return
        # Several processes that open an empty database together break its migration: one creates it, the others wait.
        with (path.parent / f".{path.name}.lock").open("w") as lock:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_database(uri, path):
                _create_database(path)
    except OSError as error:
        raise TrackingError(
            f"{shown(uri)}: cannot create this database ({error.strerror}); choose a writable place with tracking.uri"
        ) from None


def _is_database(uri: str, path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    try:
        with contextlib.closing(open_sqlite(path, _LOCKED_S)) as database:
            database.execute("SELECT count(*) FROM experiments").fetchone()
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise UnreachableError(
                f"{shown(uri)}: another program has kept {path} locked for {_LOCKED_S:g} seconds; end it, or try again"
            ) from None
        if name.startswith(("SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_PERM")):
            raise TrackingError(
                f"{shown(uri)}: {path} cannot be read ({error}); let this user write it and its folder, or choose "
                "another with tracking.uri"
            ) from None
        raise TrackingError(
            f"{shown(uri)}: {path} is no MLflow database ({error}); move it away, with {path.name}-journal if that is "
            "there, or choose another with tracking.uri"
        ) from None
    return True


def open_sqlite(path: Path, patience_s: float) -> sqlite3.Connection:
    """Open a database that exists; raises sqlite3.Error.

    Not read-only, though nothing is written here: what a killed writer has left unfinished beside the file is taken
    back by whoever opens it next, and without the right to write that would be refused for good.

    Args:
        patience_s: how long another program's lock is waited for.
    """
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=patience_s)


def _create_database(path: Path) -> None:
    with scratch_folder.made(path.parent, ".creating-") as scratch:
        beside = scratch / path.name
        beside_uri = f"sqlite:///{beside.resolve()}"
        with explained(beside_uri):
            client(beside_uri).search_experiments(max_results=1)
        for ending in ("-journal", "-wal"):
            # Of a database that is no longer there: SQLite would take it for the new one's, and write it over that.
            with contextlib.suppress(FileNotFoundError):
                left = path.with_name(f"{path.name}{ending}")
                left.replace(left.with_name(f"{left.name}.old"))
        beside.replace(path)
        flush(path.parent)
