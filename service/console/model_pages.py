"""The pages of registered models: all of them, one with its versions, one version."""

import re

from fastapi import APIRouter, Request, Response

from service.api.access import Identity
from service.api.questions import reading
from service.console import models
from service.console.entrance import PageRoute, Reader
from service.console.job_pages import run_link
from service.console.models import Shelf
from service.console.rendering import page
from service.errors import UnknownJobError
from service.jobs.desk import Desk
from service.jobs.job import Job

# Columns of metrics in the table of versions; a page has more.
_MOST_COLUMNS = 4
router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/models")
async def all_models(request: Request, identity: Reader) -> Response:
    """Every registered model."""
    return await reading(request, lambda: _all(request, identity))


def _all(request: Request, identity: Identity) -> Response:
    shelf: Shelf = request.app.state.shelf
    return page(
        request,
        "models.html",
        identity,
        title="Models",
        here="models",
        groups=models.grouped(shelf.rows()),
        headline=models.headline,
    )


@router.get("/models/{name}")
async def one_model(request: Request, identity: Reader, name: str) -> Response:
    """The versions of a model."""
    return await reading(request, lambda: _model(request, identity, name))


def _model(request: Request, identity: Identity, name: str) -> Response:
    shelf: Shelf = request.app.state.shelf
    versions = shelf.versions(name)
    names = dict.fromkeys(key for row in versions for key in (*sorted(row.metrics), *sorted(row.downstream)))
    first = [key for key in ("val/top1", "val/AP", "val/top5") if key in names]
    columns = list(dict.fromkeys([*first, *names]))[:_MOST_COLUMNS]
    return page(
        request, "model.html", identity, title=name, here="models", name=name, versions=versions, columns=columns
    )


@router.get("/models/{name}/{version}")
async def one_version(request: Request, identity: Reader, name: str, version: int) -> Response:
    """A version: how good, where from, what for."""
    return await reading(request, lambda: _one(request, identity, name, version))


def _one(request: Request, identity: Identity, name: str, version: int) -> Response:
    shelf: Shelf = request.app.state.shelf
    desk: Desk = request.app.state.desk
    row = shelf.version(name, version)
    origin = shelf.origin(row)
    return page(
        request,
        "version.html",
        identity,
        title=f"{name}, version {version}",
        here="models",
        row=row,
        origin=origin,
        job=_job(desk, row.run_id),
        jobs={one.run_id: _job(desk, one.run_id) for one in origin.findings},
        init_version=_version(origin.init_from),
        mlflow=run_link(desk, origin.experiment_id, row.run_id),
        commands=models.commands(row),
        python=models.python(row),
    )


def _job(desk: Desk, run_id: str) -> Job | None:
    """The job that a run is, None if it is no job of this service."""
    try:
        return desk.record.get(run_id) if run_id else None
    except UnknownJobError:
        return None


def _version(uri: str) -> tuple[str, str] | None:
    """(name, version) of `models:/NAME/VERSION`; None for any other."""
    found = re.fullmatch(r"models:/+([^/:@]+)/([0-9]{1,18})", uri)
    return (found[1], found[2]) if found else None


__all__ = ["router"]
