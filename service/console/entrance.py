"""Who may see a page or press a button; logging in and out; errors as pages."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from service.api.access import Access, Identity
from service.api.faults import ForbiddenError, TooManyRequestsError, UnauthorizedError, status_of
from service.console.rendering import page
from service.errors import LorotError

_MOST_FIELDS = 100
_TITLES = {
    400: "That does not work",
    401: "Who are you?",
    403: "You may not do that",
    404: "There is no such thing",
    409: "Not now",
    413: "Too much at once",
    429: "Too often",
    503: "Something behind the service does not answer",
    507: "No room",
}


class PageRoute(APIRoute):
    """A route whose errors are pages, and which leads whom nobody knows to the login."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of the route, with these answers around it."""
        handle = super().get_route_handler()

        async def explained(request: Request) -> Response:
            try:
                return await handle(request)
            except UnauthorizedError as error:
                if request.method not in ("GET", "HEAD"):
                    return _error(request, 401, str(error))
                target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
                return see(request, f"/login?next={quote(target, safe='')}")
            except LorotError as error:
                response = _error(request, status_of(error), str(error))
                if isinstance(error, TooManyRequestsError):
                    response.headers["Retry-After"] = str(max(1, round(error.retry_after_s + 0.5)))
                return response
            except RequestValidationError:
                return _error(request, 400, "the address holds what this page does not take")
            except HTTPException as error:
                return _error(request, error.status_code, str(error.detail))

        return explained


async def form(request: Request) -> dict[str, str]:
    """The text fields that a form has sent; of two of a name the last."""
    given = await request.form(max_files=0, max_fields=_MOST_FIELDS)
    return {name: value for name, value in given.items() if isinstance(value, str)}


Form = Annotated[dict[str, str], Depends(form)]


def reader(request: Request) -> Identity:
    """Whoever asks for a page may read."""
    return _allowed(request, "read")


def submitter(request: Request, sent: Form) -> Identity:
    """Whoever sends a form may submit, and it is a form of ours."""
    return _allowed(request, "submit", sent.get("csrf", ""))


def composer(request: Request) -> Identity:
    """Whoever asks for the form may submit."""
    return _allowed(request, "submit")


Reader = Annotated[Identity, Depends(reader)]
Submitter = Annotated[Identity, Depends(submitter)]
Composer = Annotated[Identity, Depends(composer)]
router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/login")
def login_page(request: Request, next: str = "/") -> Response:
    """The form that takes a token."""
    return page(request, "login.html", title="Log in", next=_own(next), wrong="")


@router.post("/login")
async def login(request: Request, sent: Form) -> Response:
    """A token becomes a session."""
    access: Access = request.app.state.access
    target = _own(sent.get("next", "/"))
    response = see(request, target)
    try:
        await run_in_threadpool(access.sign_in, request, response, sent.get("token", ""))
    except UnauthorizedError:
        wrong = "This token is not known here: look for a missing character, or ask for a new one."
        return page(request, "login.html", title="Log in", next=target, wrong=wrong, status=401)
    return response


@router.post("/logout")
def logout(request: Request, sent: Form) -> Response:
    """The session ends."""
    access: Access = request.app.state.access
    access.identify(request, csrf=sent.get("csrf", ""))
    response = see(request, "/login")
    access.sign_out(request, response)
    return response


def see(request: Request, path: str) -> RedirectResponse:
    """Go on at another page of ours."""
    return RedirectResponse(request.scope.get("root_path", "") + path, 303)


def _allowed(request: Request, scope: str, csrf: str | None = None) -> Identity:
    access: Access = request.app.state.access
    identity = access.identify(request, csrf=csrf)
    request.state.identity = identity
    if not identity.may(scope):
        raise ForbiddenError(f"{identity.name} may not do this: it needs a token with the scope {scope}")
    return identity


def _error(request: Request, status: int, message: str) -> HTMLResponse:
    identity = getattr(request.state, "identity", None)
    title = _TITLES.get(status, "That went wrong")
    return page(request, "error.html", identity, status=status, title=title, message=message)


def _own(target: str) -> str:
    """A path of this service: nobody is to be led elsewhere by a link to our login."""
    parts = urlsplit(target)
    is_path = target.startswith("/") and not target.startswith("//") and "\\" not in target
    plain = all(32 < ord(char) < 127 for char in target)
    return target if is_path and plain and not parts.netloc and not parts.scheme else "/"


__all__ = ["Composer", "Form", "PageRoute", "Reader", "Submitter", "router", "see"]
