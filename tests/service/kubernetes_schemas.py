"""The schemas of all versions of Kubernetes that the service is for."""

import functools
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import kubernetes_validate.utils

# 1.29 is the oldest that knows every field by default; the newest is what the schemas end with.
VERSIONS = sorted(
    {version for version in kubernetes_validate.utils.all_versions() if int(version.split(".")[1]) >= 29},
    key=lambda version: int(version.split(".")[1]),
)
# The library reads megabytes of them anew for each object.
_READ: Callable[..., Any] = functools.cache(kubernetes_validate.utils.schema_contents)


def validate(document: dict[str, Any]) -> None:
    """Hold an object of a core kind to the schema of each version; raises ValidationError, for unknown fields too."""
    usual = kubernetes_validate.utils.schema_contents
    kubernetes_validate.utils.schema_contents = _READ
    try:
        for version in VERSIONS:
            assert kubernetes_validate.validate(document, version, strict=True) == version.rpartition(".")[0]
    finally:
        kubernetes_validate.utils.schema_contents = usual
