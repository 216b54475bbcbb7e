"""/v1/jobs: hand jobs in, look at them, stop and repeat them."""

import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any, BinaryIO, get_args

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from service.api import intake, ranges, shapes
from service.api.access import Identity, needs
from service.api.documents import faults
from service.api.faults import ForbiddenError
from service.api.questions import Questions, changing, reading
from service.errors import ConfigError
from service.jobs.desk import Desk
from service.jobs.job import Job, State
from service.jobs.spec import BackendName, Kind

router = APIRouter(prefix="/v1", tags=["jobs"])
# Also a part of it, from the beginning, as long as it is one job's only.
JobId = Annotated[str, Path(max_length=64, description="the job's id, or six digits and more of its beginning")]
Key = Annotated[
    str | None,
    Header(alias="Idempotency-Key", max_length=intake.LONGEST_KEY, pattern=intake.KEY, description="the same as `key`"),
]
_MOST = 200
_PIECE_BYTES = 256 << 10
# Jobs write these files: shown to a browser they may neither run anything nor load it from elsewhere.
_FILE_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'self'"
_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".yaml": "text/plain; charset=utf-8",
    ".jsonl": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
_OF_FILES = {
    "ETag": {"description": "another one once the file has changed", "schema": {"type": "string"}},
    "Accept-Ranges": {"description": "bytes", "schema": {"type": "string"}},
}
_OF_PARTS = {"Content-Range": {"description": "bytes FIRST-LAST/LENGTH", "schema": {"type": "string"}}}
Reader = Annotated[Identity, Depends(needs("read"))]
Submitter = Annotated[Identity, Depends(needs("submit"))]


def desk_of(request: Request) -> Desk:
    """The desk that all requests go to."""
    desk: Desk = request.app.state.desk
    return desk


@router.post(
    "/jobs",
    operation_id="submitJob",
    summary="Submit a job",
    status_code=201,
    response_model=shapes.JobShape,
    responses={
        200: {"model": shapes.JobShape, "description": "This key's job was here already; nothing new was made."},
        **faults(400, 409, 429, 503),
    },
)
async def submit(
    request: Request, response: Response, body: shapes.Submission, who: Submitter, key: Key = None
) -> dict[str, Any]:
    """Check a job, record it and queue it. With a key, sending it again after a lost answer makes no second job."""
    if key and body.key and key != body.key:
        raise ConfigError(f"key: the body says {body.key!r} and the header Idempotency-Key {key!r}; give it once")
    request.state.action = "submit"
    job, is_new = await changing(request, lambda: intake.take_in(request, body.spec, who, body.key or key or ""))
    if not is_new:
        response.status_code = 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return shapes.job(job)


@router.get(
    "/jobs",
    operation_id="listJobs",
    summary="List jobs, the newest first",
    response_model=shapes.PageShape,
    responses=faults(400),
)
async def page(
    request: Request,
    who: Reader,
    state: Annotated[State | None, Query(description="one of " + ", ".join(get_args(State)))] = None,
    kind: Annotated[Kind | None, Query()] = None,
    backend: Annotated[BackendName | None, Query()] = None,
    owner: Annotated[str | None, Query(max_length=64, description="name of a token")] = None,
    name: Annotated[str | None, Query(max_length=64, description="of the job")] = None,
    limit: Annotated[int, Query(ge=1, le=_MOST)] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before")] = None,
) -> dict[str, Any]:
    """Everybody with the scope read sees all jobs. The questions narrow each other down."""
    wanted: dict[str, Any] = {"state": state, "kind": kind, "backend": backend, "owner": owner, "name": name}
    desk = desk_of(request)
    ask = partial(desk.page, **wanted, limit=limit, cursor=cursor)
    # From memory that takes less than threads do to take turns, which is all that a busy service lacks time for.
    return shapes.page(ask() if desk.record.is_in_memory else await run_in_threadpool(ask))


# Before the routes with an id, which would take "compare" for one.
@router.get(
    "/jobs/compare",
    operation_id="compareJobs",
    summary="Compare jobs",
    response_model=dict[str, Any],
    responses=faults(400, 404, 503),
)
async def compare(
    request: Request,
    who: Reader,
    id: Annotated[list[str], Query(min_length=2, max_length=20, description="of a job; given two times or more")],
) -> dict[str, Any]:
    """`jobs` and `names`, and by key and name a value for each of them: `settings` in which they differ, `metrics` (the
    last values), and `best` (of those metrics of which it is known which way is better).

    Settings below `config.` are what the jobs were resolved to, every default included, where `configurations` say
    `resolved`; else that says why they are as the job was submitted.
    """
    questions: Questions = request.app.state.questions
    desk = desk_of(request)
    compared: dict[str, Any] = await reading(request, lambda: shapes.finite(questions.compare(desk, id)))
    return compared


@router.get(
    "/jobs/{job_id}",
    operation_id="showJob",
    summary="Show a job and how far it is",
    response_model=shapes.JobShape,
    responses=faults(404),
)
def show(request: Request, who: Reader, job_id: JobId) -> dict[str, Any]:
    """How it stands, all its attempts, and its progress."""
    desk = desk_of(request)
    job = desk.get(job_id)
    return shapes.job(job, desk.progress(job.id))


@router.get(
    "/jobs/{job_id}/config",
    operation_id="showConfig",
    summary="Show a job's resolved configuration",
    response_model=shapes.ConfigShape,
    responses=faults(404, 503),
)
async def configuration(request: Request, who: Reader, job_id: JobId) -> dict[str, Any]:
    """Every key with its value, as the job was checked when it was submitted. By that it starts, whatever the service's
    defaults are by then.
    """
    questions: Questions = request.app.state.questions
    desk = desk_of(request)
    return {"config": await reading(request, lambda: shapes.finite(questions.configuration(desk, job_id)))}


@router.get(
    "/jobs/{job_id}/metrics",
    operation_id="listMetrics",
    summary="List a job's metrics",
    response_model=dict[str, list[dict[str, Any]]],
    responses=faults(404, 503),
)
async def metrics(request: Request, who: Reader, job_id: JobId) -> dict[str, Any]:
    """A record for each time that it measured: `step`, and the metrics by name; null for what was no finite number."""
    questions: Questions = request.app.state.questions
    desk = desk_of(request)
    return {"metrics": await reading(request, lambda: shapes.finite(questions.history(desk, job_id)))}


@router.get(
    "/jobs/{job_id}/files",
    operation_id="listFiles",
    summary="List a job's files",
    response_model=dict[str, list[dict[str, Any]]],
    responses=faults(404),
)
def files(request: Request, who: Reader, job_id: JobId) -> dict[str, Any]:
    """What of its folder may be shown: name and bytes."""
    desk = desk_of(request)
    found = desk.files(desk.get(job_id).id)
    sized = [{"name": name, "bytes": _bytes(path)} for name, path in sorted(found.items())]
    return {"files": [entry for entry in sized if entry["bytes"] is not None]}


@router.get(
    "/jobs/{job_id}/files/{name:path}",
    operation_id="readFile",
    summary="Read one of a job's files",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"*/*": {}}, "description": "The file.", "headers": _OF_FILES},
        206: {"content": {"*/*": {}}, "description": "The part.", "headers": _OF_FILES | _OF_PARTS},
        **faults(404, 416),
    },
)
def file(
    request: Request,
    who: Reader,
    job_id: JobId,
    name: Annotated[str, Path(max_length=300)],
    at: Annotated[str | None, Query(max_length=40, description="anything: with another one, no cache has it")] = None,
    part: Annotated[
        str | None,
        Header(alias="Range", description="one, as bytes=0-999, bytes=1000- or bytes=-1000; other than that: the file"),
    ] = None,
    only_if: Annotated[
        str | None, Header(alias="If-Range", description="the ETag of a part that is there already; else the whole")
    ] = None,
) -> StreamingResponse:
    """The file as it is, or a part of it. A browser that shows it runs nothing of it."""
    desk = desk_of(request)
    content = desk.open_file(desk.get(job_id).id, name)
    try:
        state = os.fstat(content.fileno())
        entity = ranges.tag(state)
        found = ranges.wanted(part, only_if, state.st_size, entity)
    except BaseException:
        content.close()
        raise
    start, end = found or (0, state.st_size)
    media = _TYPES.get(FilePath(name).suffix, "application/octet-stream")
    headers = {"content-security-policy": _FILE_POLICY, "content-length": str(end - start)}
    headers |= {"accept-ranges": "bytes", "etag": entity}
    if found:
        headers["content-range"] = f"bytes {start}-{end - 1}/{state.st_size}"
    pieces = _pieces(content, start, end - start)
    return StreamingResponse(pieces, 206 if found else 200, media_type=media, headers=headers)


@router.post(
    "/jobs/{job_id}/cancel",
    operation_id="cancelJob",
    summary="Stop a job",
    response_model=shapes.JobShape,
    responses=faults(404, 409, 503),
)
async def cancel(request: Request, who: Submitter, job_id: JobId) -> dict[str, Any]:
    """Ask it to stop, and kill it after its grace period. Asking again changes nothing. Others' jobs need admin."""
    return await _change(request, who, job_id, "cancel", desk_of(request).cancel)


@router.post(
    "/jobs/{job_id}/retry",
    operation_id="retryJob",
    summary="Start a job anew",
    response_model=shapes.JobShape,
    responses=faults(404, 409, 503),
)
async def retry(request: Request, who: Submitter, job_id: JobId) -> dict[str, Any]:
    """Queue a job that failed or was stopped again, from the beginning; what it left is set aside.

    One that finished is submitted again instead. Others' jobs need admin.
    """
    return await _change(request, who, job_id, "retry", desk_of(request).retry)


@router.post(
    "/jobs/{job_id}/resume",
    operation_id="resumeJob",
    summary="Go on with a job",
    response_model=shapes.JobShape,
    responses=faults(404, 409, 503),
)
async def resume(request: Request, who: Submitter, job_id: JobId) -> dict[str, Any]:
    """Queue a job that failed or was stopped again, from its last checkpoint. Others' jobs need admin."""
    return await _change(request, who, job_id, "resume", desk_of(request).resume)


async def _change(
    request: Request, who: Identity, job_id: str, action: str, change: Callable[[str], Job]
) -> dict[str, Any]:
    job = desk_of(request).get(job_id)
    request.state.job, request.state.action = job.id, action
    if not who.may_change(job):
        owner = f"{job.owner!r}" if job.owner else "this machine's user"
        raise ForbiddenError(f"job {job.id} is of {owner}, and you are {who.name!r}; the scope admin may {action} it")
    return shapes.job(await changing(request, lambda: change(job.id)))


def _pieces(content: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    """The bytes that were announced: what a job adds meanwhile is left out."""
    with content:
        content.seek(start)
        while size > 0 and (piece := content.read(min(_PIECE_BYTES, size))):
            size -= len(piece)
            yield piece


def _bytes(path: FilePath) -> int | None:
    """None for what is not there, or no file of its own."""
    try:
        state = path.lstat()
    except OSError:
        return None
    return state.st_size if stat.S_ISREG(state.st_mode) else None


__all__ = ["JobId", "Reader", "Submitter", "desk_of", "router"]
