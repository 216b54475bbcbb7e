"""/healthz, /readyz and /metrics: for probes and Prometheus."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from service.api.access import Access
from service.api.documents import faults
from service.api.faults import RETRY_S
from service.api.job_routes import Reader
from service.api.meters import Meters
from service.errors import LorotError
from service.jobs.controller import Controller

_UNTOLD = "what is wrong there is told to whoever sends a token"

router = APIRouter(tags=["operations"])


@router.get("/healthz", operation_id="isAlive", summary="Whether the service is alive", response_model=dict[str, str])
async def healthz() -> dict[str, str]:
    """It answers; what it depends on is /readyz's question."""
    return {"status": "alive"}


@router.get(
    "/readyz",
    operation_id="isReady",
    summary="Whether the service can do its work",
    response_model=dict[str, Any],
    responses={503: {"description": "What is away, and what is wrong with it.", "model": dict[str, Any]}},
)
async def readyz(request: Request) -> Response:
    """503 while the controller does not get on, or the tracking server does not answer; `problems` says what else.

    Reasons, which hold addresses and paths, are for those who are known here: any token will do, where there are some.
    """
    controller: Controller = request.app.state.controller
    problems = {str(name): str(reason) for name, reason in dict(controller.problems).items()}
    is_closing = bool(request.app.state.is_closing)
    if is_closing:
        problems["service"] = "it is being shut down"
    if controller.is_well and not is_closing:
        # A backend that is away keeps its own jobs waiting, and nothing else.
        return JSONResponse({"status": "ready", "problems": _shown(problems, request)})
    shown = _shown(problems or {"controller": "its rounds do not go on"}, request)
    return JSONResponse({"status": "not ready", "problems": shown}, 503, headers={"Retry-After": str(RETRY_S)})


@router.get(
    "/metrics",
    operation_id="readMeters",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}, **faults()},
)
def metrics(request: Request, who: Reader) -> Response:
    """Queue, jobs by state, failures, submissions, latencies of requests, images/s and data wait of running jobs."""
    meters: Meters = request.app.state.meters
    return Response(meters.text(), media_type=CONTENT_TYPE_LATEST)


def _shown(problems: dict[str, str], request: Request) -> dict[str, str]:
    """What whoever asks may see of them."""
    access: Access = request.app.state.access
    try:
        access.identify(request)
    except LorotError:
        return dict.fromkeys(problems, _UNTOLD)
    return problems
