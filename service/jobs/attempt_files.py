"""What of an attempt is kept in the job's folder, and outlives what the backend had of it: its start, end and logs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service import plain_files
from service.errors import StorageError
from service.jobs.backends import Handle, Status

_EXIT = "exit.json"
_NOTED = ("exit_code", "reason", "preempted", "out_of_memory", "image_digest", "started_s", "ended_s", "nodes")


def place(results: Path, name: str, handle: Handle) -> tuple[Path, int]:
    """The job's folder and the attempt's number, by the handle or else by the name, which holds both."""
    digits, _, last = name.removeprefix("lorot-").rpartition("-")
    number = int(last) if last.isdecimal() else 1
    if handle.get("folder"):
        return Path(str(handle["folder"])), number
    found = sorted(results.glob(f"{digits}*")) if digits.isalnum() else []
    return (found[0] if found else results / name), number


def log(folder: Path, number: int, node: int | str) -> Path:
    """Where the log of a node is kept."""
    return folder / "attempts" / str(number) / f"log-node{node}.txt"


def note_starting(folder: Path, number: int, node: int | str) -> None:
    """Write down that a node is about to be started; raises StorageError."""
    _write(folder, _starting(number, node), b"")


def is_starting(folder: Path, number: int, node: int | str) -> bool:
    """Whether somebody was about to start a node, and may have; raises StorageError where that cannot be seen."""
    path = _starting(number, node)
    try:
        plain_files.text(folder, path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"{folder / path}: cannot be read ({error.strerror})") from None
    return True


def note(folder: Path, number: int, status: Status) -> None:
    """Write down how an attempt ended; raises StorageError."""
    content = json.dumps({name: getattr(status, name) for name in _NOTED}, indent=1) + "\n"
    _write(folder, _path(number), content.encode())


def noted(folder: Path, number: int) -> Status | None:
    """How an attempt ended; None if nothing was noted."""
    try:
        said: Mapping[str, Any] = json.loads(plain_files.text(folder, _path(number)))
        return Status("ended", **{name: said[name] for name in _NOTED} | {"nodes": tuple(said["nodes"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, path: str, content: bytes) -> None:
    try:
        with plain_files.writing(folder, path) as file:
            file.write(content)
    except OSError as error:
        raise StorageError(f"{folder / path}: cannot be written ({error.strerror}); free some space") from None


def _starting(number: int, node: int | str) -> str:
    return f"attempts/{number}/starting-node{node}"


def _path(number: int) -> str:
    return f"attempts/{number}/{_EXIT}"
