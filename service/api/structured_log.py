"""Log records as JSON, one a line, on stderr: for people with `jq` and for collectors."""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

ACCESS = logging.getLogger("lorot.access")
SERVICE = logging.getLogger("lorot.service")


class JsonLines(logging.Formatter):
    """A record as a JSON object; what a caller gave as `extra={"fields": {...}}` becomes keys of it."""

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            content |= fields
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        # Escaped throughout: whatever a client has sent stays within its line.
        return json.dumps(content, default=str)


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as UTC, as 2026-11-22T15:04:05.678Z."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"


def start(level: int = logging.INFO) -> None:
    """Send all of this process's log records to stderr so."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    # Its access log knows neither who asked nor the request's id; ours does.
    logging.getLogger("uvicorn.access").disabled = True
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    for name in ("urllib3", "kubernetes", "docker", "alembic", "sqlalchemy", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
