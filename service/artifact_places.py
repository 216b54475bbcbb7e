"""Where artifacts may be written to and read from. Imports no MLflow.

Whoever reaches MLflow can make an experiment or a model version whose artifacts lie wherever they say, and a tracking
server asks nobody who they are. `file:///somewhere`, and other addresses that the reader itself resolves, would have
the job service write and read there for them. So an address is opened only if it leads to an object store, to the
tracking server itself, into the folder beside a local database, or below what the operator has named.
"""

import json
import os
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from service import store
from service.errors import ConfigError

# What the job service gives its local jobs: the roots, as JSON.
VARIABLE = "LOROT_ARTIFACT_ROOTS"
# Places with an address of their own, the same from everywhere.
_STORES = frozenset({"s3", "gs", "wasb", "wasbs", "abfs", "abfss", "r2", "b2", "oci"})
_SERVED = ("mlflow-artifacts", "http", "https")

# Folders of this machine, or beginnings of addresses, below which artifacts may lie besides.
Roots = tuple[str, ...]


class PlaceError(ConfigError):
    """Artifacts lie where this process may not write or read."""


def given() -> Roots | None:
    """The roots that this process was given; None: it was started by a person, who trusts the MLflow that they name.

    Raises:
        ConfigError: the variable holds something else.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    try:
        roots = json.loads(text)
    except ValueError:
        roots = None
    if not isinstance(roots, list) or not all(isinstance(root, str) for root in roots):
        raise ConfigError(f'{VARIABLE}: write a JSON list, as ["/mnt/artifacts"]')
    return tuple(roots)


def absolute(roots: Iterable[str]) -> Roots:
    """The same, independent of the working folder."""
    return tuple(root if (path := local_path(root)) is None else str(path.absolute()) for root in roots)


def local_path(location: str) -> Path | None:
    """The path of this machine at which MLflow would open an artifact location; None if that is elsewhere."""
    if len(urllib.parse.urlsplit(location).scheme) > 1 and not location.lower().startswith("file:"):
        return None
    # As MLflow reads it: not a path if it is written FILE:, and what is behind a ";" is none of it.
    path = urllib.parse.urlparse(location).path if location.startswith("file:") else location
    return Path(urllib.request.url2pathname(path))


def refuse_foreign(location: str, uri: str, roots: Roots | None) -> None:
    """Raise PlaceError if artifacts at `location` may not be opened.

    Args:
        location: a run's artifact URI, or of something below that.
        uri: MLflow, which has named it.
        roots: None: MLflow is trusted.
    """
    if roots is None or any(_is_below(location, root) for root in roots):
        return
    parts = urllib.parse.urlsplit(location)
    path = local_path(location)
    if path is not None:
        if any(_is_inside(path, folder) for folder in _beside(uri)):
            return
        what = "a folder of this machine"
    elif parts.scheme in _STORES or (parts.scheme in _SERVED and _is_of_server(parts, uri)):
        return
    else:
        what = "neither an object store nor the tracking server's own"
    raise PlaceError(
        f"artifacts at {store.shown(location)}: this is {what}, and anybody who reaches MLflow could have named it; "
        "choose another experiment, or have the operator name the place (artifact_roots in the service's settings)"
    )


def _is_of_server(parts: urllib.parse.SplitResult, uri: str) -> bool:
    """Whether an address is the tracking server's, which alone is told the password."""
    if not parts.netloc:
        return parts.scheme == "mlflow-artifacts"
    # As texts: what another reader would take for another host is not the same.
    return uri.startswith(("http://", "https://")) and parts.netloc == urllib.parse.urlsplit(store.shown(uri)).netloc


def _beside(uri: str) -> list[Path]:
    """The folders of a local database's artifacts: ours, and MLflow's own default."""
    database = store.sqlite_path(uri)
    if database is None:
        return []
    folder = database.resolve().parent
    return [folder / "artifacts", folder if folder.name == "mlruns" else folder / "mlruns"]


def _is_below(location: str, root: str) -> bool:
    if (folder := local_path(root)) is not None:
        path = local_path(location)
        return path is not None and _is_inside(path, folder)
    own = f"{root.rstrip('/')}/"
    return f"{location}/".startswith(own) and ".." not in PurePosixPath(urllib.parse.unquote(location)).parts


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads into a folder when links are followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False
