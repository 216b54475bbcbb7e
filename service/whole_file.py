"""A JSON file that is there whole or not at all, whoever is killed while it is written. Imports no torch."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Put a JSON object there, also if the machine loses its power; for this user's eyes alone. Raises OSError."""
    beside = path.with_name(f".{path.name}.writing")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
