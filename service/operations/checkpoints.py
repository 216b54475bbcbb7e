"""What lies in a job's folder and who holds it, looked at without torch and without following links."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service import plain_files
from service.operations import removal

# As `service.training.checkpoint` writes them; that one needs torch.
FORMAT = 1
INDEX = "checkpoint.json"
_NAME = re.compile(r"step-([0-9]{8,})")
_FILE = re.compile(r"[a-z]+\.safetensors")
_LARGEST_INDEX_BYTES = 64 << 20
# Who holds a run's folder has locked one of these, or writes here once a second, whatever machine it is on.
_LOCKS = re.compile(r"(launcher.*|worker)\.lock")
_OWNER = "owner.json"
_SILENT_S = 60.0
_RUNNER = "runner.lock"


def find(root: Path, parts: Sequence[str]) -> list[str]:
    """Names of the checkpoints in a folder, the newest first, whether sound or not."""
    steps = ((int(match[1]), name) for name in removal.names(root, parts) if (match := _NAME.fullmatch(name)))
    return [name for _, name in sorted(steps, reverse=True) if removal.is_folder(root, (*parts, name))]


def is_sound(root: Path, parts: Sequence[str]) -> bool:
    """Whether a checkpoint's index and every byte of its files are as they were written. Reads all of it."""
    try:
        with plain_files.opened(root, parts) as folder:
            index = json.loads(_read(folder, INDEX))
            if index["format"] != FORMAT or index["sha256"] != _digest_of(index):
                return False
            return all(_FILE.fullmatch(name) and _is_whole(folder, name, own) for name, own in index["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def is_held(root: Path, parts: Sequence[str], now_s: float | None = None) -> bool:
    """Whether a living process works in a run's folder, as far as locks and signs of life tell."""
    now_s = time.time() if now_s is None else now_s
    for name in removal.names(root, parts):
        if _LOCKS.fullmatch(name) and _is_locked(root, (*parts, name)):
            return True
    owner = removal.state_of(root, (*parts, _OWNER))
    return owner is not None and now_s - owner.st_mtime < _SILENT_S


def is_run(root: Path, job: str) -> bool:
    """Whether an attempt of a job's folder is being run by `service.jobs.runner`."""
    return any(
        _is_locked(root, (job, "attempts", number, _RUNNER)) for number in removal.names(root, (job, "attempts"))
    )


def _is_locked(root: Path, parts: Sequence[str]) -> bool:
    with contextlib.suppress(OSError), plain_files.opened(root, parts[:-1]) as folder:
        lock = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        try:
            # Shared: it is not to be in the way of another who only looks.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
    return False


def _read(folder: int, name: str) -> bytes:
    with os.fdopen(plain_files.regular(name, os.O_RDONLY, folder), "rb") as file:
        return file.read(_LARGEST_INDEX_BYTES)


def _is_whole(folder: int, name: str, expected: dict[str, Any]) -> bool:
    descriptor = plain_files.regular(name, os.O_RDONLY, folder)
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size != expected["bytes"]:
            return False
        return hashlib.file_digest(file, "sha256").hexdigest() == expected["sha256"]


def _digest_of(index: dict[str, Any]) -> str:
    content = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
