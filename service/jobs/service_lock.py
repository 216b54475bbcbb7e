"""The lock that lets one service work on a record, with a note by which another one is told who that is. No torch."""

import contextlib
import fcntl
import json
import logging
import os
from pathlib import Path

from service.errors import StorageError, TakenError
from service.holder import Holder

_log = logging.getLogger(__name__)


def take(state: Path) -> int:
    """Take the lock in the service's folder; returns its descriptor, whose end is the lock's.

    Raises:
        TakenError: another service works on this record; which.
        StorageError: the folder cannot be written.
    """
    try:
        state.mkdir(parents=True, exist_ok=True)
        path = state / "service.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(f"state: {state} cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        told = os.pread(lock, 4096, 0)
        os.close(lock)
        raise TakenError(f"{path}: another service works on this record{_who(told)}; stop it first") from None
    except OSError:
        _log.warning("%s: this file system has no locks; see to it that one service runs", path)
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(Holder.here().content()).encode(), 0)
    return lock


def _who(told: bytes) -> str:
    with contextlib.suppress(ValueError, TypeError):
        holder = Holder.read(json.loads(told))
        if holder is not None:
            return f" (process {holder.pid} on {holder.host})"
    return ""
