"""What the API says of itself in OpenAPI: the errors of each route, and what all of them have in common."""

from typing import Any

from fastapi import FastAPI

from service.api import shapes

DESCRIPTION = """Submit training jobs and containers, watch them, and find the models that came out.

**Who asks**: send a token as `Authorization: Bearer lorot_...`; `lorot token create NAME --scope read|submit|admin`
makes one. Each scope may do what the ones before it may. All jobs are visible to everybody with the scope `read`; with
`submit` one stops and repeats one's own, with `admin` everybody's. On loopback no token is needed until one is made.

**Errors** are `{"error": {"type", "message", "request_id"}}` throughout. `429` and `503` carry `Retry-After`, seconds.

**Sending again** is safe: `POST /v1/jobs` with a `key` makes one job, however often it arrives.
"""
TAGS = [
    {"name": "jobs", "description": "Hand jobs in, look at them, stop and repeat them."},
    {"name": "streams", "description": "Logs and changes as they come, by server-sent events."},
    {"name": "models", "description": "What was registered, where it comes from, and how good it is."},
    {"name": "service", "description": "Checks, the queue, tokens."},
    {"name": "operations", "description": "For probes and Prometheus."},
]
_MEANINGS = {
    400: "The question or the job is wrong; the message lists what, and what would work.",
    401: "It is not known who asks.",
    403: "Whoever asks may not do that.",
    404: "There is no such job, file or model.",
    408: "The body has not come in time.",
    409: "The job is in no state for that.",
    413: "The body is too long.",
    416: "The file has no such bytes; Content-Range says how many it has.",
    422: "A field is missing, unknown or wrong; the message has a line for each.",
    429: "Too many requests, or too much at once.",
    503: "The tracking server, or the place where jobs run, does not answer.",
}
# Of every route that asks who is there.
_EVERYWHERE = (400, 401, 403, 422, 429)


_RETRY = {"Retry-After": {"description": "seconds after which to try again", "schema": {"type": "integer"}}}
_HEADERS = {
    416: {"Content-Range": {"description": "bytes */LENGTH of the file", "schema": {"type": "string"}}},
    429: _RETRY,
    503: _RETRY,
}


def faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that can answer with these errors, and with those that any route can."""
    return {
        status: {
            "model": shapes.FaultShape,
            "description": _MEANINGS[status],
            **({"headers": _HEADERS[status]} if status in _HEADERS else {}),
        }
        for status in sorted({*_EVERYWHERE, *statuses})
    }


def add_to(app: FastAPI) -> None:
    """Let every operation with a body say that the body may be too long or too slow, and all that an id comes back."""
    inner = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        content = inner()
        fault = {"$ref": "#/components/schemas/FaultShape"}
        request_id = {"description": "of the request, for the log", "schema": {"type": "string"}}
        for operations in content["paths"].values():
            for operation in operations.values():
                if "requestBody" in operation:
                    for status in (408, 413):
                        told = {"description": _MEANINGS[status], "content": {"application/json": {"schema": fault}}}
                        operation["responses"].setdefault(str(status), told)
                for response in operation["responses"].values():
                    response.setdefault("headers", {}).setdefault("X-Request-ID", request_id)
        # FastAPI's own shape of validation errors, which nothing here answers with.
        for unused in ("HTTPValidationError", "ValidationError"):
            content["components"]["schemas"].pop(unused, None)
        return content

    app.openapi = described  # type: ignore[method-assign]
