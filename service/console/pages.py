"""The console as a whole, put into the service's app."""

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from service.console import compare_pages, entrance, job_pages, model_pages, submit_pages
from service.console.amounts import Estimator
from service.console.models import Shelf
from service.console.rendering import STATIC
from service.jobs.desk import Desk


def mount(app: FastAPI) -> None:
    """Add the pages, and the style sheet and scripts that they ask for; `app.state` has desk and access."""
    desk: Desk = app.state.desk
    app.state.shelf = Shelf(desk.record.uri, app.state.questions)
    app.state.estimator = Estimator(desk.record.uri, desk.settings.artifact_roots)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    for part in (entrance, job_pages, compare_pages, model_pages, submit_pages):
        app.include_router(part.router)


__all__ = ["mount"]
