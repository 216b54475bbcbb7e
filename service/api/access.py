"""Who asks, and what they may: tokens, sessions of browsers, and the free use of one's own machine."""

import contextlib
import ipaddress
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import HTTPConnection

from service.api import parameters
from service.api.faults import ForbiddenError, TooManyRequestsError, UnauthorizedError
from service.api.limits import Buckets
from service.api.sessions import COOKIE, LIFETIME_S, Sessions
from service.api.structured_log import SERVICE
from service.api.tokens import LOCAL, SCOPES, Token, Tokens
from service.errors import BackendError, ConfigError
from service.jobs.job import Job
from service.jobs.settings import ServiceSettings

_SAFE = ("GET", "HEAD", "OPTIONS")
CSRF_HEADER = "x-csrf-token"
_bearer = HTTPBearer(auto_error=False, description="A token, as `lorot token create NAME --scope submit` prints it.")


@dataclass(frozen=True)
class Identity:
    """Who asks.

    Attributes:
        name: of the token, or `local`; jobs carry it as their owner.
        scopes: of `tokens.SCOPES`.
    """

    name: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        return scope in self.scopes

    def may_change(self, job: Job) -> bool:
        """Whether they may stop or repeat a job: their own with scope submit, anybody's with admin."""
        return self.may("admin") or (self.may("submit") and job.owner == self.name)


class Access:
    """The rules of one service.

    Args:
        host: the address that it listens on. On loopback, as long as no token was ever made, whoever reaches it is
            `local` and may do everything.
    """

    def __init__(self, settings: ServiceSettings, *, host: str = "127.0.0.1") -> None:
        self.settings = settings
        self.host = host
        self.tokens = Tokens(settings.state / "tokens.json")
        self.sessions = Sessions(settings.state / "session.key")
        self.failures = Buckets(settings.limits.failures_per_minute)
        self.is_loopback = is_loopback(host)

    @property
    def is_open(self) -> bool:
        """Whether nobody has to say who they are."""
        return self.is_loopback and not self.tokens.were_made

    def check_start(self) -> None:
        """Raises ConfigError where everybody on the network could do everything, or nobody anything."""
        tokens = self.tokens.list()
        if not self.is_loopback and not tokens:
            raise ConfigError(
                f"{self.host} can be reached from outside, and there is no token that would tell who asks; make one "
                "with `lorot token create NAME --scope submit`, or serve on 127.0.0.1"
            )

    def identify(self, request: HTTPConnection, *, csrf: str | None = None) -> Identity:
        """Who asks.

        Args:
            csrf: what a form of the console carried in its field `csrf`; scripts send it as X-CSRF-Token.

        Raises:
            UnauthorizedError: nobody we know.
            ForbiddenError: another site's page made a browser ask.
            TooManyRequestsError: too many wrong tokens came from there.
        """
        if credentials := request.headers.get("authorization"):
            token = self._bearer(credentials)
            if token is None:
                raise self._failed(request, "the token is not known here: it was revoked, or cut short on its way")
            return _identity(token)
        if cookie := request.cookies.get(COOKIE):
            token = self._in_session(cookie)
            if token is not None:
                self._check_origin(request)
                if request.scope.get("method", "GET") not in _SAFE:
                    given = csrf if csrf is not None else request.headers.get(CSRF_HEADER, "")
                    if not self.sessions.is_ours(cookie, given):
                        raise ForbiddenError("the form is too old, or not one of this service's; load its page again")
                return _identity(token)
        if self.is_open:
            return self._local(request)
        hint = "send a token in the header Authorization: Bearer lorot_..., as `lorot token create` prints it"
        raise UnauthorizedError(f"it is not known who asks; {hint}")

    def client_of(self, request: HTTPConnection) -> str:
        """Whose requests are counted together: a token's, also by its sessions, or else a site's."""
        token = self._token(request)
        return f"token {token.name}" if token else f"address {_site(request)}"

    def is_known(self, request: HTTPConnection) -> bool:
        """Whether whoever asks has said who they are, or nobody has to; their rights are not looked at."""
        return self.is_open or self._token(request) is not None

    def sign_in(self, request: HTTPConnection, response: Response, token: str) -> Identity:
        """Give a browser a session for its token; raises UnauthorizedError, ForbiddenError, TooManyRequestsError."""
        self._check_origin(request)
        known = self._find(token.strip())
        if known is None:
            raise self._failed(request, "this token is not known here; `lorot token create` makes one")
        response.set_cookie(
            COOKIE,
            self.sessions.open(known),
            max_age=LIFETIME_S,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return _identity(known)

    def sign_out(self, request: HTTPConnection, response: Response) -> None:
        """End a browser's session."""
        cookie = request.cookies.get(COOKIE, "")
        if self._in_session(cookie) is not None:
            self.sessions.close(cookie)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")

    def csrf(self, request: HTTPConnection) -> str:
        """What the forms of a page carry along; empty where there is no session to protect."""
        cookie = request.cookies.get(COOKIE, "")
        return self.sessions.csrf(cookie) if self._in_session(cookie) is not None else ""

    def _token(self, request: HTTPConnection) -> Token | None:
        if credentials := request.headers.get("authorization"):
            return self._bearer(credentials)
        return self._in_session(request.cookies.get(COOKIE, ""))

    def _bearer(self, credentials: str) -> Token | None:
        scheme, _, token = credentials.partition(" ")
        return self._find(token.strip()) if scheme.lower() == "bearer" and token else None

    def _in_session(self, cookie: str) -> Token | None:
        name = self.sessions.name_in(cookie)
        if name is None:
            return None
        with _unread():
            token = next((known for known in self.tokens.list() if known.name == name), None)
        return token if token is not None and self.sessions.holds(cookie, token) else None

    def _find(self, token: str) -> Token | None:
        with _unread():
            return self.tokens.find(token)

    def _failed(self, request: HTTPConnection, message: str) -> Exception:
        if wait := self.failures.take(_site(request)):
            return TooManyRequestsError("too many wrong tokens have come from this address; wait a little", wait)
        return UnauthorizedError(message)

    def _local(self, request: HTTPConnection) -> Identity:
        if any(name in request.headers for name in ("x-forwarded-for", "forwarded", "x-real-ip")):
            raise UnauthorizedError(
                "this came through a proxy, and there is no token that would tell who asks; make one with "
                "`lorot token create NAME --scope submit`"
            )
        self._check_origin(request)
        return Identity(LOCAL, frozenset(SCOPES))

    def _check_origin(self, request: HTTPConnection) -> None:
        """A browser says which site's page makes it ask; other sites may not, whatever it carries along."""
        if request.scope.get("method", "GET") in _SAFE:
            return
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        strange = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if strange or request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ForbiddenError(f"a page of another site ({(origin or 'unknown')[:200]}) asked for this")


def needs(scope: str) -> Callable[..., Awaitable[Identity]]:
    """The rule of a route: whoever asks has this scope, and asks for nothing that the route does not know.

    Raises as `Access.identify`, ForbiddenError, and as `parameters.refuse_strange`.
    """

    async def rule(
        request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
    ) -> Identity:
        access: Access = request.app.state.access
        identity = access.identify(request)
        request.state.identity = identity
        if not identity.may(scope):
            has = ", ".join(name for name in SCOPES if identity.may(name)) or "none"
            raise ForbiddenError(
                f"{identity.name} has the scope {has}, and this needs {scope}; "
                f"`lorot token create NAME --scope {scope}` makes such a token"
            )
        parameters.refuse_strange(request)
        return identity

    rule.scope = scope  # type: ignore[attr-defined]
    return rule


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def address(request: HTTPConnection) -> str:
    """Where a request came from; uvicorn has put in what a proxy that is believed has said."""
    return request.client.host if request.client else "unknown"


def _site(request: HTTPConnection) -> str:
    """Whose an address is: of IPv6 a site has 2^64, any of which it may take, and is counted as one."""
    text = address(request)
    try:
        found = ipaddress.IPv6Address(text.partition("%")[0])
    except ValueError:
        return text
    return str(found.ipv4_mapped or ipaddress.IPv6Network((found, 64), strict=False))


@contextlib.contextmanager
def _unread() -> Iterator[None]:
    """Tell clients nothing of the service's own files: what is wrong with the tokens is for its log."""
    try:
        yield
    except ConfigError as error:
        SERVICE.error("the tokens cannot be read", extra={"fields": {"problem": str(error)}})
        raise BackendError(
            "the service cannot read its tokens, so nobody is let in; its log says more to who runs it"
        ) from None


def _identity(token: Token) -> Identity:
    return Identity(token.name, frozenset(token.scopes))


__all__ = ["CSRF_HEADER", "Access", "Identity", "address", "is_loopback", "needs"]
