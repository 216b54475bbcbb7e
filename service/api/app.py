"""The application: routes, errors, the guard before them, and how all of it begins and ends."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.routing import Route

from service.api import documents, faults, job_routes, model_routes, operations, service_routes, stream_routes
from service.api.access import Access
from service.api.audit import Audit
from service.api.changes import Changes
from service.api.followers import Followers
from service.api.guard import Guard
from service.api.meters import Meters
from service.api.questions import Questions
from service.api.streams import Streams
from service.jobs.controller import Controller
from service.jobs.desk import Desk

VERSION = "1.0"


def create(desk: Desk, controller: Controller, access: Access) -> FastAPI:
    """The service over HTTP. `app.state` has desk, controller and access, and what only this application has.

    The controller is started and stopped by whoever has made it; `begin_to_close` ends what would never end by itself.
    """
    limits = desk.settings.limits
    meters, changes = Meters(desk, controller), Changes()
    followers = Followers(desk)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        changes.open()
        yield
        begin_to_close(app)
        followers.free()

    app = FastAPI(
        title="lorot",
        summary="Submit training jobs, watch them, find the models.",
        description=documents.DESCRIPTION,
        version=VERSION,
        openapi_url="/v1/openapi.json",
        openapi_tags=documents.TAGS,
        # Their pages load programs from elsewhere.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.desk, app.state.controller, app.state.access = desk, controller, access
    app.state.meters, app.state.changes, app.state.followers = meters, changes, followers
    app.state.streams, app.state.is_closing = Streams(limits.followers, limits.followers_each, meters), False
    controller.on_change.append(changes.tell)
    app.state.questions, app.state.routes = Questions(), []
    for part in (job_routes, stream_routes, model_routes, service_routes, operations):
        app.include_router(part.router)
        app.state.routes += [route for route in part.router.routes if isinstance(route, Route)]
    faults.add_to(app)
    documents.add_to(app)
    audit = Audit(desk.settings.state / "audit.jsonl", limits.audit_bytes)
    app.add_middleware(Guard, access=access, audit=audit, meters=meters)
    return app


def begin_to_close(app: FastAPI) -> None:
    """End all event streams and say at /readyz that it is ending; requests in flight are still answered."""
    app.state.is_closing = True
    app.state.changes.close()
    app.state.followers.close()
