"""The submit form: shown, looked at while somebody types, and handed in once."""

import secrets
from collections.abc import Mapping
from dataclasses import replace

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from service.api.access import Identity
from service.api.faults import TooManyRequestsError
from service.api.intake import take_in
from service.api.questions import changing, reading
from service.console import submission
from service.console.amounts import Amounts, Estimator
from service.console.entrance import Composer, Form, PageRoute, Submitter, see
from service.console.rendering import page
from service.console.submission import Checked
from service.errors import LorotError, StateError, UnknownJobError
from service.jobs import backends, traits
from service.jobs.desk import Desk
from service.jobs.spec import KINDS

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/submit")
def blank(request: Request, identity: Composer, like: str = "") -> Response:
    """The form, empty or filled in as another job was."""
    desk: Desk = request.app.state.desk
    values, notice = submission.first(desk.settings)
    if like:
        try:
            values, notice = submission.fields_like(desk.get(like)), ""
        except UnknownJobError as error:
            notice = str(error)
    return _show(request, identity, values, _fresh_key(), notice=notice)


@router.post("/submit/look")
async def looked_at(request: Request, identity: Submitter, form: Form) -> Response:
    """Look at the form while somebody fills it in; `action`: validate, or check with what it amounts to.

    Nothing is handed in here, so it is not for the audit log, and has a rate limit of its own.
    """
    request.state.is_question = True
    desk: Desk = request.app.state.desk
    values = submission.fields_of(form, desk.settings)
    checked = await reading(request, lambda: submission.check(values, desk))
    amounts = await _amounts(request, checked, is_asked=form.get("action") == "check")
    # What somebody types is wrong most of the time, and no error.
    return _show(request, identity, values, form.get("key", "") or _fresh_key(), checked, amounts, was_checked=True)


@router.post("/submit")
async def sent(request: Request, identity: Submitter, form: Form) -> Response:
    """Hand the form in, or look at it where there is no script (`action`: check)."""
    if form.get("action", "submit") != "submit":
        return await looked_at(request, identity, form)
    desk: Desk = request.app.state.desk
    values = submission.fields_of(form, desk.settings)
    key, wait_s = form.get("key", "") or _fresh_key(), 0.0
    request.state.action = "form: submit"
    checked = await reading(request, lambda: submission.check(values, desk))
    spec = checked.spec
    if spec is not None:
        try:
            job, _ = await changing(request, lambda: take_in(request, spec, identity, key))
        except StateError:
            # The key stands for a job of other values: somebody came back to the form and changed it.
            key = _fresh_key()
            told = "this form was handed in before, with other values; submit it again to make another job of it"
            checked = replace(checked, problems=(submission.Problem("", told),))
        except LorotError as error:
            wait_s = error.retry_after_s if isinstance(error, TooManyRequestsError) else 0.0
            checked = replace(checked, problems=(submission.Problem("", str(error)),))
        else:
            return see(request, f"/jobs/{job.id}")
    amounts = await _amounts(request, checked, is_asked=False)
    status = 429 if wait_s else 400
    shown = _show(request, identity, values, key, checked, amounts, status=status, was_checked=True)
    if wait_s:
        shown.headers["Retry-After"] = str(round(wait_s))
    return shown


async def _amounts(request: Request, checked: Checked, is_asked: bool) -> Amounts | None:
    """What it amounts to, if that is known already or asked for."""
    estimator: Estimator = request.app.state.estimator
    if checked.spec is None or checked.spec.kind == "container":
        return None
    workers, resolved = checked.spec.workers, checked.resolved
    if not is_asked:
        return estimator.known(resolved, workers)
    return await to_thread.run_sync(lambda: estimator.ask(resolved, workers), limiter=estimator.threads)


def _show(
    request: Request,
    identity: Identity,
    values: Mapping[str, str],
    key: str,
    checked: Checked | None = None,
    amounts: Amounts | None = None,
    *,
    status: int = 200,
    was_checked: bool = False,
    notice: str = "",
) -> Response:
    desk: Desk = request.app.state.desk
    checked = checked or Checked()
    places = {name: traits.of(name) for name in backends.enabled(desk.settings)}
    return page(
        request,
        "submit.html",
        identity,
        status=status,
        title="Submit a job",
        here="submit",
        notice=notice,
        values=values,
        key=key,
        checked=checked,
        was_checked=was_checked,
        amounts=amounts,
        is_countable=checked.spec is not None and checked.spec.kind != "container",
        shipped=submission.shipped(),
        labels=submission.LABELS,
        kinds=KINDS,
        places=places,
        has_image=any(place.in_containers for place in places.values()),
    )


def _fresh_key() -> str:
    """The same form sent twice is one job: the key was made with it."""
    return f"form-{secrets.token_urlsafe(18)}"


__all__ = ["router"]
