"""/v1/models: what was registered."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request

from service import registry
from service.api import shapes
from service.api.documents import faults
from service.api.job_routes import Reader, desk_of
from service.api.questions import LONG_S, Questions, reading
from service.errors import UnknownJobError
from service.registry import Row

router = APIRouter(prefix="/v1/models", tags=["models"])
Name = Annotated[str, Path(max_length=256, description="of a registered model")]


@router.get(
    "",
    operation_id="listModels",
    summary="List the newest version of every model",
    response_model=shapes.ModelsShape,
    responses=faults(503),
)
async def models(request: Request, who: Reader) -> dict[str, Any]:
    """How good, where from, and what downstream jobs found out about it."""
    newest = [row for row in await _rows(request) if "latest" in row.aliases]
    return {"models": [shapes.version(row) for row in newest]}


@router.get(
    "/{name}",
    operation_id="listVersions",
    summary="List the versions of a model",
    response_model=shapes.ModelsShape,
    responses=faults(404, 503),
)
async def versions(request: Request, who: Reader, name: Name) -> dict[str, Any]:
    """The newest first."""
    return {"models": [shapes.version(row) for row in await _of(request, name)]}


@router.get(
    "/{name}/{version}",
    operation_id="showVersion",
    summary="Show one version of a model",
    response_model=shapes.VersionShape,
    responses=faults(404, 503),
)
async def version(
    request: Request,
    who: Reader,
    name: Name,
    version: Annotated[str, Path(max_length=256, description="its number, or an alias as best or latest")],
) -> dict[str, Any]:
    """Its metrics, lineage and downstream results."""
    rows = await _of(request, name)
    for row in rows:
        if version == str(row.version) or version in row.aliases:
            return shapes.version(row)
    known = ", ".join(str(row.version) for row in rows[:20])
    aliases = ", ".join(sorted({alias for row in rows for alias in row.aliases}))
    raise UnknownJobError(f"model {name!r} has no version {version!r}; versions: {known}; aliases: {aliases}")


async def _rows(request: Request) -> list[Row]:
    questions: Questions = request.app.state.questions
    uri = desk_of(request).record.uri
    return await reading(request, lambda: questions.ask(("rows", uri), lambda: registry.list_models(uri), LONG_S))


async def _of(request: Request, name: str) -> list[Row]:
    rows = await _rows(request)
    if found := [row for row in rows if row.name == name]:
        return found
    known = ", ".join(sorted({row.name for row in rows})) or "none yet"
    raise UnknownJobError(f"there is no registered model {name!r}; there are {known}")
