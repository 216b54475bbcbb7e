"""What a submitted configuration may name: no file outside of the declared roots, and nothing that is the service's.

Imports no torch.
"""

import re
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from service.errors import ConfigError
from service.jobs import traits
from service.jobs.settings import REMOTE, ServiceSettings

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_MODELS = ("models:/", "runs:/")
# Keys whose values are paths, however they look; of any other it is told by its look.
_PATHS = ("data.root", "deepspeed", "model.init_from", "model.backbone")
# Keys that the service sets, and the only other value that they may hold.
_OURS: Mapping[str, Any] = {
    "output": "runs",
    "tracking.uri": None,
    "tracking.experiment": "lorot",
    "data.cache_folder": None,
}


def own_keys(config: Mapping[str, Any]) -> None:
    """Refuse a submitted configuration that says what the service decides.

    Raises:
        ConfigError: which keys do.
    """
    if "extends" in config:
        raise ConfigError(
            "config.extends: a submitted configuration stands alone, since it may not read files of the service; "
            "send the keys of the file that it extends along with its own"
        )
    given = dict(_leaves(config))
    for key, default in _OURS.items():
        value = given.get(key, default)
        if value != default:
            raise ConfigError(f"config.{key}: {value!r} is the service's to decide; leave it away")


def paths(config: Mapping[str, Any], settings: ServiceSettings, backend: str) -> None:
    """Refuse a configuration that names a file or a folder outside of the roots.

    Symbolic links and `..` are followed first. Models by models:/ and runs:/ are no files of this machine. Data may lie
    below an address that the operator has declared and below no other: the service itself looks at the data of what it
    checks, with its own credentials and from within its own network.

    Raises:
        ConfigError: which key, and what the roots are.
    """
    for key, value in _leaves(config):
        if not isinstance(value, str) or not (_is_path_key(key) or _looks_like_path(value)):
            continue
        if value.startswith(REMOTE) and key == "data.root":
            _below_an_address(value, settings)
            continue
        if value.startswith(_MODELS) and key in ("model.init_from", "model.backbone"):
            continue
        if (url := _URL.match(value)) and (len(url[1]) > 1 or "://" in value):
            allowed = "s3://, gs://, http:// and https://" if key == "data.root" else "models:/ and runs:/"
            raise ConfigError(f"config.{key}: {value!r} may not be read by jobs; of addresses there may be {allowed}")
        inside(value, settings, f"config.{key}", backend)


def roots(settings: ServiceSettings, backend: str) -> list[Path]:
    """The folders that a job's configuration may name files in, as the job sees them."""
    own = traits.of(backend).data_roots(settings)
    return list(dict.fromkeys([*(root.absolute() for root in settings.data_roots), *own]))


def _below_an_address(url: str, settings: ServiceSettings) -> None:
    # Clients take `..` and what they drop out of an address before they ask; `::` would name a second one.
    path = urllib.parse.unquote(url)
    is_plain = path.isprintable() and ".." not in re.split(r"[/\\]", path) and "::" not in path
    if not is_plain or not any(url == one or url.startswith(f"{one}/") for one in settings.data_urls):
        named = ", ".join(settings.data_urls) or "there are none"
        raise ConfigError(
            f"config.data.root: {url!r} lies outside of the addresses that jobs may read (data_urls of the service's "
            f"settings): {named}"
        )


def is_elsewhere(text: str) -> bool:
    """Whether it names data or a model that is no file of this machine."""
    return text.startswith((*REMOTE, *_MODELS))


def inside(text: str, settings: ServiceSettings, key: str, backend: str) -> Path:
    """The path, absolute and without links; raises ConfigError if it lies outside of the roots."""
    own = roots(settings, backend)
    try:
        # No `~`: that would be the service's own home.
        path = Path(text).resolve()
        real = [root.resolve() for root in own]
    except (OSError, ValueError, RuntimeError):
        raise ConfigError(f"{key}: {text!r} is no path") from None
    if "\x00" in text or text.startswith("~") or not any(path == root or root in path.parents for root in real):
        named = ", ".join(map(str, own)) or "there are none"
        raise ConfigError(f"{key}: {text!r} lies outside of the folders that jobs may read (data_roots): {named}")
    return path


def _is_path_key(key: str) -> bool:
    return key in _PATHS


def _looks_like_path(value: str) -> bool:
    return value.startswith(("/", "~", "file:")) or "://" in value or ".." in PurePosixPath(value).parts


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping and no list; what a list holds has the list's key."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, prefix)
    else:
        yield prefix, value
