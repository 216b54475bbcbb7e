"""/v1/check, /v1/queue, /v1/tokens."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response

from service.api import shapes
from service.api.access import Access, Identity, needs
from service.api.documents import faults
from service.api.job_routes import Reader, desk_of
from service.api.questions import reading
from service.api.tokens import SCOPES, Token
from service.errors import UnknownJobError

router = APIRouter(prefix="/v1", tags=["service"])
Admin = Annotated[Identity, Depends(needs("admin"))]


@router.post(
    "/check",
    operation_id="checkJob",
    summary="Check a job without handing it in",
    response_model=shapes.CheckShape,
    responses=faults(400, 503),
)
async def check(request: Request, body: shapes.Question, who: Reader) -> dict[str, Any]:
    """The same rules as submitting it: its configuration, data roots, backend, and what this service has.

    With `manifests` also what it would be in the cluster, by this service's settings; zeros stand for the job's id. A
    `trainjob`, which the service does not follow, has a name and a folder of its own each time.
    """
    request.state.is_question = True
    return await reading(request, lambda: shapes.checked(desk_of(request), body.spec, body.manifests))


@router.get(
    "/queue",
    operation_id="showQueue",
    summary="Show this machine's queue",
    response_model=shapes.QueueShape,
    responses=faults(),
)
def queue(request: Request, who: Reader) -> dict[str, Any]:
    """GPUs and cores, all and taken, and whose turn it is."""
    standing: dict[str, Any] = shapes.finite(desk_of(request).queue())
    return standing


@router.get(
    "/tokens",
    operation_id="listTokens",
    summary="List the tokens",
    response_model=shapes.TokensShape,
    responses=faults(),
)
def tokens(request: Request, who: Admin) -> dict[str, Any]:
    """Whose they are and what they may; the tokens themselves are kept nowhere."""
    return {"tokens": [_shape(token) for token in _access(request).tokens.list()]}


@router.post(
    "/tokens",
    operation_id="createToken",
    summary="Make a token",
    status_code=201,
    response_model=shapes.NewTokenShape,
    responses=faults(400),
)
def create(request: Request, body: shapes.TokenWish, who: Admin) -> dict[str, Any]:
    """The answer shows it, once."""
    request.state.action = "create token"
    kept = _access(request).tokens
    secret = kept.create(body.name, body.scope)
    made = next(token for token in kept.list() if token.name == body.name)
    return _shape(made) | {"token": secret}


@router.delete(
    "/tokens/{name}",
    operation_id="revokeToken",
    summary="Revoke a token",
    status_code=204,
    response_class=Response,
    responses=faults(404),
)
def revoke(request: Request, who: Admin, name: Annotated[str, Path(max_length=64)]) -> Response:
    """At once, with the sessions of browsers that were opened by it. Its jobs go on."""
    request.state.action = "revoke token"
    kept = _access(request).tokens
    if name not in (known := [token.name for token in kept.list()]):
        raise UnknownJobError(f"there is no token {name!r}; there are {', '.join(known) or 'none'}")
    kept.revoke(name)
    return Response(status_code=204)


def _access(request: Request) -> Access:
    access: Access = request.app.state.access
    return access


def _shape(token: Token) -> dict[str, Any]:
    scopes = [scope for scope in SCOPES if scope in token.scopes]
    return {"name": token.name, "scopes": scopes, "created": token.created}
