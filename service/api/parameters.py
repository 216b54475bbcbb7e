"""What stands behind the `?` of an address: nothing that a route does not know is passed over in silence."""

import difflib
from typing import Any

from fastapi import Request

from service.errors import ConfigError


def refuse_strange(request: Request) -> None:
    """Refuse a parameter that the route does not have, as `status` for `state`: it would answer another question.

    Raises:
        ConfigError: which one, and which was meant; or one is given twice that has one value.
    """
    known = _known(request)
    for name in request.query_params:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            here = f"known here: {', '.join(known)}" if known else "this address takes none"
            raise ConfigError(f"{name[:80]}: unknown parameter; " + (f"did you mean {near[0]!r}?" if near else here))
        if not known[name] and len(request.query_params.getlist(name)) > 1:
            raise ConfigError(f"{name}: is given several times; give it once")


def _known(request: Request) -> dict[str, bool]:
    """The names of the route's parameters, as its description has them, and whether one may be given several times."""
    operations: dict[str, Any] = request.app.openapi()["paths"].get(request.scope["route"].path_format, {})
    listed = operations.get(request.method.lower(), {}).get("parameters", ())
    return {one["name"]: one["schema"].get("type") == "array" for one in listed if one["in"] == "query"}
