"""Server-sent events on the wire (https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6)."""

import json
from typing import Any

MEDIA_TYPE = "text/event-stream"
# A comment, which clients pass over: it shows both ends that the other one is there.
KEEPALIVE = b":\n\n"
KEEPALIVE_S = 15.0
# Proxies hand such answers on as they come.
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def event(data: str, *, name: str = "", identifier: str = "") -> bytes:
    """One event. Its data may have several lines; CR and CRLF, which end lines here as well, become LF.

    Args:
        name, identifier: of one line; line ends in them would begin another field.
    """
    fields = [f"event: {_one_line(name)}"] if name else []
    if identifier:
        fields.append(f"id: {_one_line(identifier)}")
    fields += [f"data: {line}" for line in data.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return ("\n".join(fields) + "\n\n").encode("utf-8", "replace")


def json_event(content: Any, *, name: str, identifier: str = "") -> bytes:
    """One event whose data is JSON on one line."""
    return event(json.dumps(content, allow_nan=False), name=name, identifier=identifier)


def _one_line(text: str) -> str:
    return text.translate({10: None, 13: None, 0: None})
