"""Jobs side by side: in which settings they differ, what came out, and their curves over one another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from service import curves, figures
from service.api.access import Identity
from service.api.questions import configurations, reading
from service.console import cost, words
from service.console.entrance import PageRoute, Reader
from service.console.job_pages import history_of
from service.console.rendering import page
from service.errors import UnknownJobError
from service.jobs import shown
from service.jobs.desk import Desk
from service.jobs.job import Job

# As many as the style sheet has colours for, and curves dashes.
MOST = 6
router = APIRouter(route_class=PageRoute, include_in_schema=False)


@dataclass(frozen=True)
class Cell:
    """A metric of one job.

    Attributes:
        last, best: in words; "" for none.
        leads: no other job has a better best.
    """

    last: str
    best: str
    leads: bool


@router.get("/compare")
async def compare(request: Request, identity: Reader, id: Annotated[list[str] | None, Query()] = None) -> Response:
    """The jobs of these ids; with fewer than two of them, a place to name another."""
    return await reading(request, lambda: _compared(request, identity, id or []))


def _compared(request: Request, identity: Identity, asked: Sequence[str]) -> Response:
    desk: Desk = request.app.state.desk
    jobs, problems = _chosen(desk, asked)
    histories = [history_of(request, desk, job) for job in jobs]
    found = shown.compare(jobs, histories, configurations(desk, jobs))
    runs = [(str(number), history) for number, history in enumerate(histories, 1)]
    return page(
        request,
        "compare.html",
        identity,
        title="Compare jobs",
        here="jobs",
        notice="\n".join(problems),
        jobs=[(job, cost.seconds(job, job.ended_s) if job.has_ended else 0.0) for job in jobs],
        most=MOST,
        settings=list(_settings(found)),
        caveats=shown.caveats(found),
        metrics=list(_metrics(found)),
        charts=curves.of_runs(runs),
        swatch=figures.swatch,
    )


def _chosen(desk: Desk, asked: Sequence[str]) -> tuple[list[Job], list[str]]:
    """Each job once, of the first `MOST` ids, and what is wrong with the other ids."""
    jobs: dict[str, Job] = {}
    problems = []
    # A field that was left empty is sent all the same.
    ids = list(dict.fromkeys(filter(None, (one.strip() for one in asked))))
    # An address has room for thousands, each of which may be looked for in the whole record.
    for job_id in ids[:MOST]:
        try:
            job = desk.get(job_id)
        except UnknownJobError as error:
            problems.append(str(error))
            continue
        jobs[job.id] = job
    if len(ids) > MOST:
        problems.append(f"{MOST} jobs at most are compared here; only the first {MOST} that were named were looked for")
    return list(jobs.values()), problems


def _settings(found: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Of each setting its name, and of each job (value, what to say where it has none)."""
    for key, row in found["settings"].items():
        absent = [shown.stand_in(key, told) or "not set" for told in found["configurations"]]
        yield key, list(zip(map(words.setting, row), absent, strict=True))


def _metrics(found: Mapping[str, Any]) -> list[tuple[str, list[Cell]]]:
    rows = []
    for name, last in found["metrics"].items():
        best = found["best"].get(name, [None] * len(last))
        known = [value for value in best if value is not None]
        # Of one job alone nothing is better.
        choose = shown.better(name)
        top = choose(known) if choose is not None and len(set(known)) > 1 else None
        told = [["" if value is None else words.metric(name, value) for value in row] for row in (last, best)]
        leads = [top is not None and value == top for value in best]
        rows.append((name, [Cell(*cell) for cell in zip(*told, leads, strict=True)]))
    return rows


__all__ = ["MOST", "router"]
