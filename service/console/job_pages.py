"""The pages of jobs: all of them, one of them, and the buttons of one."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import urlencode

import yaml
from fastapi import APIRouter, Query, Request, Response

from pipelines import pretext
from service import curves, store
from service.api.access import Identity
from service.api.faults import ForbiddenError
from service.api.questions import Questions, changing, reading
from service.console import cost, words
from service.console.entrance import PageRoute, Reader, Submitter, see
from service.console.rendering import page
from service.errors import LorotError, UnknownJobError
from service.jobs.desk import Desk
from service.jobs.job import TRANSITIONS, Job
from service.jobs.spec import KINDS

LOG_LINES = 200
_PAGE = 50
_REFRESH_S = 2
# A list in which nothing moves is looked at less often, and least a job that goes on only if somebody makes it.
_QUIET_S = 5
_ENDED_S = 20
# Of a configuration that is shown.
_TEXT_BYTES = 1 << 20
_ACTIVE = ("starting", "running", "stopping")
_LATEST = (("Loss", "train/loss"), ("Top-1", "val/top1"), ("AP", "val/AP"))
# What is offered of the files, besides the picture; in this order.
_FILES = ("report.html", "config.yaml", "job.yaml", "summary.json", "metrics.jsonl", "error.json")
_ACTIONS = {
    "cancel": (
        "Cancel",
        "It is asked to stop, and killed if it does not in time. What it has saved stays; it can be resumed.",
        "danger",
    ),
    "resume": ("Resume", "It goes on from its last checkpoint, and waits in the queue first.", ""),
    "retry": ("Retry", "It begins anew. What it has left is set aside, and waits in the queue first.", ""),
}
router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/")
def jobs(
    request: Request,
    identity: Reader,
    state: str = "",
    kind: str = "",
    owner: str = "",
    name: str = "",
    cursor: str = "",
) -> Response:
    """All jobs, the newest first, a page at a time."""
    desk: Desk = request.app.state.desk
    asked = {"state": state, "kind": kind, "owner": owner.strip(), "name": name.strip()}
    wanted = {key: value or None for key, value in asked.items()}
    found = desk.page(**wanted, limit=_PAGE, cursor=cursor or None)
    rows = [(job, _progress(desk, job) if job.state in _ACTIVE else _ended(job)) for job in found.jobs]
    queue = desk.queue()
    is_filtered = any(asked.values())
    own = {key: value for key, value in asked.items() if value}
    root = request.scope.get("root_path", "")
    running, waiting = len(queue["running"]), len(queue["waiting"])
    return page(
        request,
        "jobs.html",
        identity,
        title="Jobs",
        here="jobs",
        refresh_s=_REFRESH_S if any(job.state in _ACTIVE or job.state == "queued" for job in found.jobs) else _QUIET_S,
        amounts=_amounts(queue),
        used_share=lambda used, all_: float(used) / float(all_) if float(all_) else 0.0,
        num_running=running,
        num_waiting=waiting,
        say=f"{running} running, {waiting} waiting",
        asked=asked,
        states=list(TRANSITIONS),
        kinds=KINDS,
        is_filtered=is_filtered,
        rows=rows,
        total=found.total,
        is_partial=found.is_partial,
        newer=f"{root}/?{urlencode(own)}" if cursor else "",
        older=f"{root}/?{urlencode(own | {'cursor': found.next})}" if found.next else "",
    )


@router.get("/jobs/{job_id}")
async def job(
    request: Request,
    identity: Reader,
    job_id: str,
    node: Annotated[int, Query(ge=0, le=10_000)] = 0,
    attempt: Annotated[int | None, Query(ge=1, le=1_000_000)] = None,
) -> Response:
    """One job, as it stands."""
    return await reading(request, lambda: _one(request, identity, job_id, node, attempt))


def _one(request: Request, identity: Identity, job_id: str, node: int, attempt: int | None) -> Response:
    desk: Desk = request.app.state.desk
    found = desk.get(job_id)
    if found.id != job_id:
        return see(request, f"/jobs/{found.id}")
    version = _version(found)
    if version and request.headers.get("if-none-match") == f'"{version}"':
        # Hundreds of such pages may be open: this costs next to nothing.
        return Response(status_code=304)
    now_s = time.time()
    progress = _progress(desk, found)
    history = history_of(request, desk, found)
    config = _config(request, desk, found)
    queue = desk.queue() if found.state == "queued" else {}
    shown_attempt = attempt or (found.attempt.number if found.attempt else None)
    files = _files(desk, found)
    root = request.scope.get("root_path", "")
    ours = f"{root}/v1/jobs/{found.id}"
    choice = {"node": node} | ({"attempt": shown_attempt} if shown_attempt else {})
    waiting = list(queue.get("waiting", ()))
    return page(
        request,
        "job.html",
        identity,
        title=found.spec.name,
        here="jobs",
        refresh_s=_refresh_s(found),
        version=version,
        now_s=now_s,
        job=found,
        progress=progress,
        position=waiting.index(found.id) + 1 if found.id in waiting else 0,
        num_waiting=len(waiting),
        latest=_latest(history),
        registered=request.app.state.shelf.made_by(found.id) if found.attempts else [],
        actions=[(name, *_ACTIONS[name]) for name in _allowed(found, identity)],
        charts=curves.of_run(history, _num_pretext(config or found.spec.config), speed=True),
        attempts=found.attempts,
        nodes=found.spec.most_nodes,
        log_node=node,
        log_attempt=shown_attempt,
        log_lines=LOG_LINES,
        log=_log(desk, found, node, shown_attempt),
        log_url=f"{ours}/logs?{urlencode(choice)}",
        is_active=not found.has_ended and shown_attempt == (found.attempt.number if found.attempt else None),
        picture=f"{ours}/files/samples.png?at={files['samples.png']}" if "samples.png" in files else "",
        costs=cost.rows(found, progress, config or found.spec.config, now_s),
        places=_places(found),
        mlflow=run_link(desk, found.experiment_id, found.id),
        files=[(name, f"{ours}/files/{name}") for name in _FILES if name in files],
        texts=list(_texts(desk, found, config)),
    )


@router.post("/jobs/{job_id}/{action}")
async def act(request: Request, identity: Submitter, job_id: str, action: str) -> Response:
    """A button of a job."""
    if action not in _ACTIONS:
        raise UnknownJobError(f"no button {action!r}; there are {', '.join(_ACTIONS)}")
    desk: Desk = request.app.state.desk
    found = desk.get(job_id)
    request.state.job, request.state.action = found.id, action
    if not identity.may_change(found):
        raise ForbiddenError(f"{identity.name} may change its own jobs only; this one is {found.owner or 'local'}'s")
    change = {"cancel": desk.cancel, "retry": desk.retry, "resume": desk.resume}[action]
    await changing(request, lambda: change(found.id))
    return see(request, f"/jobs/{found.id}")


def history_of(request: Request, desk: Desk, found: Job) -> list[dict[str, float]]:
    """What a job has measured; nothing where MLflow does not say."""
    if not found.attempts:
        return []
    try:
        questions: Questions = request.app.state.questions
        return questions.history(desk, found.id)
    except LorotError:
        return []


def _refresh_s(found: Job) -> int | None:
    """How often its page is renewed; None: never, for nothing changes any more."""
    if not found.has_ended:
        return _REFRESH_S
    return None if found.state == "finished" else _ENDED_S


def _version(found: Job) -> str:
    """Of a job that has ended: another one once it was retried or resumed; "" of others, which change all the time."""
    return repr(found.queued_s) if found.has_ended else ""


def _config(request: Request, desk: Desk, found: Job) -> Mapping[str, Any]:
    """A job's resolved configuration; empty where nobody knows it, or says just now."""
    questions: Questions = request.app.state.questions
    with contextlib.suppress(LorotError):
        return questions.configuration(desk, found.id)
    return {}


def run_link(desk: Desk, experiment_id: str, run_id: str) -> str:
    """A run's page in MLflow's own interface; "" where it has none."""
    uri = store.shown(desk.settings.browser_tracking_uri or desk.record.uri)
    is_linked = uri.startswith(("http://", "https://")) and experiment_id and run_id
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}" if is_linked else ""


def _num_pretext(config: Mapping[str, Any]) -> int:
    section = config.get("pretext")
    name = section.get("name") if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping) or not isinstance(name, str) or name not in pretext.available():
        return 0
    with contextlib.suppress(LorotError, TypeError):
        return pretext.load(name, **(section.get("options") or {})).num_labels
    return 0


def _allowed(found: Job, identity: Identity) -> list[str]:
    """The buttons that make sense now, for who sees them."""
    if not identity.may_change(found):
        return []
    if not found.has_ended:
        return [] if found.cancel or found.state == "stopping" else ["cancel"]
    if found.state == "finished":
        return []
    return ["retry"] if found.spec.kind == "container" else ["resume", "retry"]


def _progress(desk: Desk, found: Job) -> dict[str, Any]:
    """Where a job stands; empty if it has not said yet."""
    try:
        return desk.progress(found.id)
    except LorotError:
        return {}


def _ended(found: Job) -> dict[str, Any]:
    """What a list says of a job that has ended."""
    took = cost.seconds(found, found.ended_s)
    return {"took_s": took} if found.has_ended and took else {}


def _latest(history: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, str]]:
    for title, name in _LATEST:
        value = next((row[name] for row in reversed(history) if name in row), None)
        if value is not None:
            yield title, words.metric(name, value)


def _log(desk: Desk, found: Job, node: int, attempt: int | None) -> str:
    if not found.attempts:
        return ""
    try:
        return words.tail(desk.logs(found.id, attempt=attempt, node=node, tail=LOG_LINES))
    except LorotError as error:
        return f"({error})"


def _files(desk: Desk, found: Job) -> dict[str, int]:
    """Names of what may be shown, and when each was written last."""
    seen = {}
    with contextlib.suppress(LorotError):
        for name, path in desk.files(found.id).items():
            with contextlib.suppress(OSError):
                seen[name] = path.stat().st_mtime_ns // 1_000_000
    return seen


def _places(found: Job) -> list[tuple[str, str]]:
    spec, asked = found.spec, found.spec.resources
    rows = [("Runs as", words.place(found)), ("Nodes", spec.nodes)]
    if spec.image:
        rows.append(("Image", spec.image))
    if spec.model:
        rows.append(("Model", spec.model))
    rows.append(
        ("Of each node", f"{asked.gpus} GPUs, {asked.cpus:g} cores" + (f", {asked.memory}" if asked.memory else ""))
    )
    rows.append(("Priority", str(spec.priority)))
    rows.append(("Retries", f"{found.failures} of {spec.retries} used"))
    return rows


def _texts(desk: Desk, found: Job, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(title, text) of the configurations."""
    whole = None
    with contextlib.suppress(LorotError, OSError):
        name = "job.yaml" if "job.yaml" in desk.files(found.id) else "config.yaml"
        with desk.open_file(found.id, name) as file:
            whole = file.read(_TEXT_BYTES).decode(errors="replace")
    if whole:
        yield "Resolved, as the worker gets it", whole
    elif config:
        yield "Resolved, as it will start", _yaml(config)
    spec = found.spec.model_dump(mode="json", exclude_defaults=True)
    yield "As submitted", _yaml(spec)


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)


def _amounts(queue: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, all, used) of this machine."""
    rows = []
    for key, title, unit in (("gpus", "GPUs", 1.0), ("cpus", "Cores", 1.0), ("memory", "Memory (GB)", 1e9)):
        found = queue[key]
        if found["all"]:
            rows.append((title, f"{found['all'] / unit:.4g}", f"{found['used'] / unit:.4g}"))
    return rows


__all__ = ["LOG_LINES", "history_of", "router", "run_link"]
