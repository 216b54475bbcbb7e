"""What goes wrong at the door, and every error as an answer: `{"error": {"type", "message", "request_id"}}`."""

import difflib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    LorotError,
    StateError,
    StorageError,
    TrackingError,
    UnknownJobError,
)
from service.explaining import explained

# Seconds after which it may be worth trying again when something behind the service is away.
RETRY_S = 5


class UnauthorizedError(LorotError):
    """Nobody knows who asks."""

    exit_code = 2


class ForbiddenError(LorotError):
    """It is known who asks, and they may not."""

    exit_code = 2


class HostError(LorotError):
    """The service was called by a name that is not its own."""

    exit_code = 2


class TooLargeError(LorotError):
    """The body of a request is longer than it may be."""

    exit_code = 2


class SlowError(LorotError):
    """A request's body does not come."""

    exit_code = 2


class TooManyRequestsError(LorotError):
    """A client asks too often, or for too much at once."""

    exit_code = 9

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RangeError(LorotError):
    """Of a file, bytes were asked for that it does not have."""

    exit_code = 2

    def __init__(self, message: str, num_bytes: int) -> None:
        super().__init__(message)
        self.num_bytes = num_bytes


# The first row that fits counts: subclasses stand before what they are derived from.
STATUSES: tuple[tuple[type[LorotError], int], ...] = (
    (UnauthorizedError, 401),
    (ForbiddenError, 403),
    (HostError, 400),
    (SlowError, 408),
    (TooLargeError, 413),
    (RangeError, 416),
    (TooManyRequestsError, 429),
    (UnknownJobError, 404),
    (StateError, 409),
    (ConfigError, 400),
    (DataError, 400),
    (CheckpointError, 404),
    (TrackingError, 503),
    (BackendError, 503),
    (StorageError, 507),
    (LorotError, 500),
)
_HTTP_TYPES = {400: "BadRequestError", 404: "NotFoundError", 405: "MethodNotAllowedError"}


def status_of(error: LorotError) -> int:
    """The HTTP status that tells this error."""
    return next(status for kind, status in STATUSES if isinstance(error, kind))


def answer(
    status: int, kind: str, message: str, request_id: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error as every client gets it."""
    content = {"error": {"type": kind, "message": printable(message), "request_id": request_id}}
    return JSONResponse(content, status, headers)


def told(error: LorotError, request_id: str) -> JSONResponse:
    """The answer that tells one of our own errors."""
    status = status_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = 'Bearer realm="lorot"'
    if isinstance(error, TooManyRequestsError):
        headers["Retry-After"] = str(max(1, round(error.retry_after_s + 0.5)))
    elif status == 503:
        headers["Retry-After"] = str(RETRY_S)
    if isinstance(error, RangeError):
        headers["Content-Range"] = f"bytes */{error.num_bytes}"
    return answer(status, type(error).__name__, str(error), request_id, headers)


def printable(text: str) -> str:
    """`text` without halves of characters, which no answer could carry."""
    return text.encode("utf-8", "replace").decode("utf-8")


def add_to(app: FastAPI) -> None:
    """Let `app` answer with these."""
    app.add_exception_handler(LorotError, _on_lorot_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_lorot_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LorotError)
    return told(error, request.state.request_id)


async def _on_invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if problems and problems[0]["type"] == "json_invalid":
        where = problems[0]["loc"][-1]
        reason = problems[0].get("ctx", {}).get("error", "")
        message = f"the body is no JSON: {reason} at character {where}"
        return answer(422, "ConfigError", message, request.state.request_id)
    return answer(422, "ConfigError", explained(problems, _bodies(request)), request.state.request_id)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = _unknown_address(request)
    elif error.status_code == 405:
        allowed = ", ".join(_methods(request)) or (error.headers or {}).get("Allow", "another method")
        message = f"{request.url.path} takes {allowed}, not {request.method}"
        return answer(405, _HTTP_TYPES[405], message, request.state.request_id, {"Allow": allowed})
    elif error.status_code == 400:
        message = f"{message}; the body of a request is JSON in UTF-8"
    kind = _HTTP_TYPES.get(error.status_code, "HttpError")
    return answer(error.status_code, kind, message, request.state.request_id, error.headers)


def _methods(request: Request) -> list[str]:
    """What the address takes, by all its routes: each of them knows its own only."""
    here = [route for route in request.app.state.routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in here for method in route.methods})


def _unknown_address(request: Request) -> str:
    paths = [route.path for route in request.app.state.routes]
    near = difflib.get_close_matches(request.url.path[:200], paths, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"there is nothing at {request.url.path[:200]!r}; {hint}/v1/openapi.json lists what there is"


def _bodies(request: Request) -> Any:
    """The model of the body that the route takes, None without one."""
    field = getattr(request.scope.get("route"), "body_field", None)
    return getattr(getattr(field, "field_info", None), "annotation", None)
