"""What every request passes before a route sees it, and every answer on its way out.

Request id, the name the service was called by, rate and body limits, security headers, the access log, the audit log.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.access import Access, address
from service.api.audit import Audit
from service.api.faults import HostError, SlowError, TooLargeError, TooManyRequestsError, answer, told
from service.api.limits import Buckets
from service.api.meters import Meters
from service.api.structured_log import ACCESS, SERVICE
from service.errors import LorotError

# Asked by probes, which know neither a name nor a token, and must not be turned away for asking often.
PROBES = ("/healthz", "/readyz")
# Asked by the console's form at every pause of somebody who types: counted apart, lest they be turned away elsewhere.
LOOKS = ("/submit/look",)
# What somebody unknown may send: a token that logs in, and where to go then.
STRANGERS_BYTES = 16_384
# For all of a body to come, seconds.
BODY_S = 60.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CHANGING = ("POST", "PUT", "PATCH", "DELETE")
_NAMES = ("localhost", "127.0.0.1", "::1")
# An answer's own header stays.
_HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "font-src 'self'; manifest-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class Guard:
    """The outermost middleware."""

    def __init__(self, app: ASGIApp, access: Access, audit: Audit, meters: Meters) -> None:
        self.app = app
        self._access = access
        self._audit = audit
        self._meters = meters
        limits = access.settings.limits
        self._asked = Buckets(limits.requests_per_minute), limits.requests_per_minute
        self._looked = Buckets(limits.looks_per_minute), limits.looks_per_minute
        self._body_bytes = limits.body_bytes
        own = access.host.strip("[]").lower()
        self._hosts = {*_NAMES, own, *(host.lower() for host in access.settings.hosts)}
        self._any_host = not access.is_loopback and not access.settings.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_s = time.perf_counter()
        state: dict[str, Any] = scope.setdefault("state", {})
        given = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        sent = {"status": 0, "bytes": 0}

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers["x-request-id"] = state["request_id"]
            elif message["type"] == "http.response.body":
                sent["bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            body = await self._admitted(scope, receive)
            await self.app(scope, _replayed(body, receive) if body is not None else receive, noted)
        except LorotError as error:
            await told(error, state["request_id"])(scope, receive, noted)
        except Exception as error:
            SERVICE.exception("unexpected failure", extra={"fields": {"request_id": state["request_id"]}})
            if sent["status"]:
                raise
            text = f"unexpected {type(error).__name__}; the service's log has more under the request's id"
            await answer(500, "InternalError", text, state["request_id"])(scope, receive, noted)
        finally:
            self._note(scope, sent, time.perf_counter() - started_s)

    async def _admitted(self, scope: Scope, receive: Receive) -> bytes | None:
        """The request's body, None for none; empty if it is long and nobody knows who sends it: routes refuse them.

        Raises:
            HostError, TooManyRequestsError, TooLargeError, SlowError: it is not heard.
        """
        request = HTTPConnection(scope)
        if scope["path"] not in PROBES:
            self._check_host(request.headers.get("host", ""))
            buckets, most = self._looked if scope["path"] in LOOKS else self._asked
            if wait := buckets.take(self._access.client_of(request)):
                raise TooManyRequestsError(f"more than {most} requests a minute; wait {wait:.1f} s", wait)
        length = request.headers.get("content-length")
        if length is None and "transfer-encoding" not in request.headers:
            return None
        # Routes ask who it is once there is a body; until then it is in memory here.
        is_known = self._access.is_known(request)
        most = self._body_bytes if is_known else min(STRANGERS_BYTES, self._body_bytes)
        body = None
        if length is None or not length.isdecimal() or int(length) <= most:
            try:
                async with asyncio.timeout(BODY_S):
                    body = await self._read(receive, most)
            except TimeoutError:
                raise SlowError(f"the body has not come within {BODY_S:g} s") from None
        if body is None:
            if not is_known:
                return b""
            raise TooLargeError(
                f"the body is longer than {most:,} bytes; data belongs below a data root, not into a request"
            )
        return body

    def _check_host(self, host: str) -> None:
        """A page elsewhere may give its own name our address; its requests then come with that name."""
        if self._any_host:
            return
        name = re.sub(r":[0-9]+$", "", host.lower()).strip("[]")
        if name not in self._hosts:
            raise HostError(f"this service is not {host[:200]!r}; setting hosts=[{name[:200]}] would let that name in")

    @staticmethod
    async def _read(receive: Receive, most: int) -> bytes | None:
        """All of it; None if it is longer than `most` bytes."""
        parts: list[bytes] = []
        total = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            total += len(parts[-1])
            if total > most:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)

    def _note(self, scope: Scope, sent: Mapping[str, int], took_s: float) -> None:
        state, method = scope["state"], scope["method"]
        route = getattr(scope.get("route"), "path", "") or "none"
        # 499: the client went away before there was an answer.
        status = sent["status"] or 499
        self._meters.request(method, route, status, took_s)
        identity = state.get("identity")
        who = getattr(identity, "name", "")
        fields = {
            "request_id": state["request_id"],
            "method": method,
            "path": scope["path"],
            "status": status,
            "took_ms": round(took_s * 1e3, 2),
            "bytes": sent["bytes"],
            "address": address(HTTPConnection(scope)),
            "who": who,
        }
        # What was asked for may be secret; where it was asked for is not.
        ACCESS.info("request", extra={"fields": fields})
        if self._is_for_audit(scope, status):
            job = state.get("job") or scope.get("path_params", {}).get("job_id", "")
            self._audit.write(
                request_id=state["request_id"],
                who=who,
                what=state.get("action") or f"{method} {scope['path'][:300]}",
                job=str(job)[:64],
                result=status,
                address=fields["address"],
            )

    @staticmethod
    def _is_for_audit(scope: Scope, status: int) -> bool:
        """Whether somebody we know has changed something, or somebody was refused who claimed to be known.

        Not what nobody in particular asks for: else anybody could push the rest out of the log.
        """
        if status == 401:
            return "authorization" in Headers(scope=scope)
        changes = scope["method"] in _CHANGING and not scope["state"].get("is_question", False)
        return status == 403 or (changes and scope["state"].get("identity") is not None)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A channel that hands over the body that was read, and then what comes after it."""
    handed_over = False

    async def again() -> Message:
        nonlocal handed_over
        if handed_over:
            return await receive()
        handed_over = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
