"""Where a service says that it is there, for commands that work in the same folder. Imports no web framework."""

import contextlib
import json
import os
from collections.abc import Iterator

from service.errors import StorageError
from service.jobs.settings import ServiceSettings

_NAME = "service.json"


@contextlib.contextmanager
def kept(settings: ServiceSettings, url: str) -> Iterator[None]:
    """Say so as long as this lasts; raises StorageError."""
    path = settings.state / _NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".writing")
        beside.write_text(json.dumps({"url": url, "pid": os.getpid()}))
        # Whoever waits for it reads it at once, and whole.
        os.replace(beside, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); state: chooses another folder") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def read(settings: ServiceSettings) -> str:
    """The address that a service has left here, "" for none. It may be gone: its lock says whether it lives."""
    try:
        return str(json.loads((settings.state / _NAME).read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
