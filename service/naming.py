"""What MLflow takes as names and values, and how ours are made to fit: they are changed rather than refused."""

import json
import re
from collections.abc import Mapping
from typing import Any

# MLflow's limits (mlflow.utils.validation): longer values and larger requests are refused.
PARAM_CHARS = 6000
TAG_CHARS = 8000
KEY_CHARS = 250


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted keys, texts as they are, the rest as JSON, cut to the limit."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
            continue
        text = legal_text(value if isinstance(value, str) else json.dumps(value, default=str))
        flat[legal_key(f"{prefix}{key}")] = text if len(text) <= PARAM_CHARS else text[: PARAM_CHARS - 1] + "…"
    return flat


def legal_key(key: str) -> str:
    """`key` with what MLflow does not allow in names replaced: `@` by `:`, anything else by `_`."""
    key = re.sub(r"[^/\w.\- :]", "_", str(key).replace("@", ":"), flags=re.ASCII)
    # MLflow also refuses what would name another place if it were a path: "..", "a//b", "/a", "a/".
    return "/".join(part for part in key.split("/") if part.strip("."))[:KEY_CHARS] or "_"


def is_model_name(name: str) -> bool:
    """Whether MLflow takes a registered model of this name: letters, digits, `-`, `_`, `.` and spaces."""
    return bool(name.strip(" .")) and re.search(r"[^\w .-]", name) is None


def legal_text(value: Any) -> str:
    """`value` as a text that every database takes: PostgreSQL knows no NUL, and no file name that is not Unicode."""
    return str(value).replace("\x00", "�").encode("utf-8", "replace").decode("utf-8")
