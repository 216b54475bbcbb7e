"""Templates to answers: what every page is given, and who sees it. Everything that is shown is escaped."""

import functools
import hashlib
import time
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse

from service.api.access import Access, Identity
from service.api.sessions import COOKIE
from service.api.tokens import SCOPES
from service.console import words

STATIC = Path(__file__).parent / "static"
_HTML = "text/html; charset=utf-8"


@functools.cache
def environment() -> jinja2.Environment:
    """The templates, with the console's words as filters."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("service.console"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Escaping keeps a text from being read as HTML; this, from looking like another one.
        finalize=_plain,
    )
    for filter_ in (words.ago, words.moment, words.machine_time, words.span, words.exit_words, words.handle):
        made.filters[filter_.__name__] = filter_
    made.filters["metric"] = words.metric
    made.globals["states"] = dict(words.STATES)
    return made


@functools.cache
def assets_version() -> str:
    """Digest of the style sheet and scripts: with it in their addresses, no browser shows old ones."""
    digest = hashlib.sha256()
    for path in sorted(STATIC.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _plain(value: Any) -> Any:
    return words.plain(value) if type(value) is str else value


def page(
    request: Request,
    template: str,
    identity: Identity | None = None,
    *,
    status: int = 200,
    title: str,
    here: str = "",
    **values: Any,
) -> HTMLResponse:
    """One page.

    Args:
        identity: who will see it; None before logging in.
        here: the entry of the menu that it belongs to.
        values: for the template.
    """
    access: Access = request.app.state.access
    shown: dict[str, Any] = {"refresh_s": None, "version": "", "notice": "", "now_s": time.time(), **values}
    text = (
        environment()
        .get_template(template)
        .render(
            title=title,
            here=here,
            root=request.scope.get("root_path", ""),
            assets=assets_version(),
            csrf=access.csrf(request),
            who=identity.name if identity else "",
            scopes=", ".join(scope for scope in SCOPES if identity and identity.may(scope)),
            may_submit=bool(identity and identity.may("submit")),
            has_session=bool(request.cookies.get(COOKIE)) and bool(access.csrf(request)),
            **shown,
        )
    )
    # A text from outside may hold halves of characters, which no page can carry.
    return HTMLResponse(text.encode("utf-8", "replace"), status, media_type=_HTML)


__all__ = ["STATIC", "assets_version", "environment", "page"]
