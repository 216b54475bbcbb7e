"""A file that is there whole or not at all, whoever is killed while it is written. Imports no torch."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Put a JSON object there, for this user's eyes alone; as `write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n", 0o600)


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Put a text in the place of what was there; once this returns it stays, also if the machine loses its power.

    Args:
        mode: permissions, of which the process's mask takes away its own.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.writing")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    flush(path.parent)


def flush(folder: Path) -> None:
    """Make sure that a folder's entries are on the disk: what was renamed or made there stays so. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
