"""The audit log: who asked the service to change what, from where, and what came of it. JSON lines, rotated by size."""

import contextlib
import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from service.api.structured_log import SERVICE, timestamp

# Files that stay besides the current one: audit.jsonl.1 is the newest of them.
KEPT = 5


class Audit:
    """One file of lines, appended whole. Thread-safe.

    Args:
        most_bytes: a new file is begun beyond it.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.path = path
        self._most_bytes = most_bytes
        self._lock = threading.Lock()

    def write(self, **fields: Any) -> None:
        """Add a line; a full disk stops nothing, but the service's log says so."""
        line = (json.dumps({"time": timestamp(time.time()), **fields}) + "\n").encode()
        with self._lock:
            try:
                self._rotate(len(line))
                file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    self._append(file, line)
                finally:
                    os.close(file)
            except OSError as error:
                SERVICE.error(
                    "the audit log cannot be written",
                    extra={"fields": {"path": str(self.path), "reason": error.strerror, "lost": fields}},
                )

    def _append(self, file: int, line: bytes) -> None:
        """Add a line whole, or raise OSError; one that a full disk or a power cut has cut short stays by itself."""
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _rotate(self, more: int) -> None:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        if size + more <= self._most_bytes:
            return
        for number in range(KEPT, 1, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._older(number - 1), self._older(number))
        os.replace(self.path, self._older(1))

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")
