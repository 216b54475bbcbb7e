"""Logs, whole or followed, and the changes of all jobs."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from service.api import questions, sse
from service.api.access import Access
from service.api.changes import Changes
from service.api.documents import faults
from service.api.followers import Followers
from service.api.job_routes import JobId, Reader, desk_of
from service.api.questions import reading
from service.api.streams import Streams
from service.errors import UnknownJobError
from service.jobs.job import Job

router = APIRouter(prefix="/v1", tags=["streams"])
LastEventId = Annotated[
    str | None, Header(alias="Last-Event-ID", max_length=80, description="id of the last event that has arrived")
]
_EVENTS = {"schema": {"type": "string"}, "example": "id: 1:34\ndata: step 20 loss 2.31\n\n"}


@router.get(
    "/jobs/{job_id}/logs",
    operation_id="readLogs",
    summary="Read or follow a job's log",
    response_class=Response,
    responses={
        200: {
            "description": "The log as text; with `follow`, as events.",
            "content": {"text/plain": {"schema": {"type": "string"}}, sse.MEDIA_TYPE: _EVENTS},
        },
        **faults(404, 503),
    },
)
async def logs(
    request: Request,
    who: Reader,
    job_id: JobId,
    attempt: Annotated[int | None, Query(ge=1, le=100_000, description="default: the newest")] = None,
    node: Annotated[int, Query(ge=0, le=9999, description="of a job on several nodes")] = 0,
    tail: Annotated[int | None, Query(ge=0, le=1_000_000, description="only the last so many lines")] = None,
    follow: Annotated[bool, Query(description="go on as it grows, until the job has ended")] = False,
    last_event_id: LastEventId = None,
) -> Response:
    """What a node has written.

    Without `follow`: its bytes. With it, server-sent events: whole lines (each event's data is one or several), ids
    that are byte offsets into the log (`OFFSET` of the attempt that was asked for; else `ATTEMPT:OFFSET`, going on with
    the next attempt), so that a reconnect with Last-Event-ID misses nothing and repeats nothing; `event: attempt` at
    the start of each attempt, `event: end` with the job's state at the end. Bytes that are no UTF-8 become U+FFFD.

    With `tail` ids may end with `@PLACE`: they count from a place in the log, which is found again in what an engine or
    a cluster keeps, also by a service that was started anew. Where it keeps that no more, a line says so, and the last
    lines come again.
    """
    desk = desk_of(request)
    job = await run_in_threadpool(desk.get, job_id)
    _check_place(job, attempt, node)
    if follow:
        followers: Followers = request.app.state.followers
        streams: Streams = request.app.state.streams
        access: Access = request.app.state.access
        followers.place(last_event_id or "", attempt)
        events = followers.follow(job.id, attempt=attempt, node=node, tail=tail, last_id=last_event_id or "")
        return streams.answer(events, access.client_of(request), lambda: access.identify(request))
    if not job.attempts:
        return Response(b"", media_type="text/plain; charset=utf-8")
    pieces = desk.logs(job.id, attempt=attempt, node=node, tail=tail)
    # What is wrong shows at the first piece, and has to be told before the answer begins.
    first = await reading(request, lambda: next(pieces, b""))
    return StreamingResponse(_joined(first, questions.pieces(request, pieces)), media_type="text/plain; charset=utf-8")


@router.get(
    "/events",
    operation_id="followChanges",
    summary="Follow the changes of all jobs",
    response_class=Response,
    responses={
        200: {
            "description": "`event: job` for every change of a job; `event: reload` where some were missed.",
            "content": {sse.MEDIA_TYPE: {"schema": {"type": "string"}}},
        },
        **faults(),
    },
)
async def events(request: Request, who: Reader, last_event_id: LastEventId = None) -> Response:
    """Each event's data is the job as JSON, without its spec. After a reconnect with Last-Event-ID what was missed
    follows first; `reload` says that it is too much, and that the list is to be asked for again.
    """
    changes: Changes = request.app.state.changes
    streams: Streams = request.app.state.streams
    access: Access = request.app.state.access
    listening = changes.listen(last_event_id or "")
    return streams.answer(listening, access.client_of(request), lambda: access.identify(request))


def _check_place(job: Job, attempt: int | None, node: int) -> None:
    if attempt is not None and attempt > job.newest + 1:
        raise UnknownJobError(f"job {job.id} has no attempt {attempt}; its newest is {job.newest or 'still to come'}")
    if node >= job.spec.most_nodes:
        raise UnknownJobError(f"job {job.id} has {job.spec.most_nodes} nodes, counted from 0, and no node {node}")


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


__all__ = ["router"]
