"""Rendering of templates into pages, with the values that every page needs."""

from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from service.access.callers import Caller
from service.access.cookies import COOKIE
from service.registry.types import utc_now
from service.web.views import request_of

MINUTE, HOUR, DAY = 60, 3600, 86_400


def render(request: Request, template: str, caller: Caller | None, **context: Any) -> HTMLResponse:
    """Render a page. `caller` is None if nobody is logged in."""
    shared = {"path": request.url.path, "caller": caller, "by_cookie": COOKIE in request.cookies}
    content = TEMPLATES.get_template(template).render(**shared, **context)
    # Browsers store no page, so that after a logout none can be seen by going back.
    return HTMLResponse(content, headers={"Cache-Control": "no-store"})


def see(request: Request, path: str) -> Response:
    """Lead to a page after a form was handled. htmx has a header of its own for that."""
    if "HX-Request" in request.headers:
        return Response(status_code=204, headers={"HX-Redirect": path})
    return RedirectResponse(path, 303)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("service.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    environment.filters |= {"number": _number, "count": _count, "ago": _ago, "query": _query, "duration": _duration}
    environment.filters["request"] = request_of
    return environment


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _count(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _ago(time: datetime | None) -> str:
    if time is None:
        return "–"
    seconds = (utc_now() - time).total_seconds()
    if seconds < MINUTE:
        return "just now"
    if seconds < HOUR:
        return f"{seconds // MINUTE:.0f} min ago"
    return f"{seconds // HOUR:.0f} h ago" if seconds < DAY else f"{time:%Y-%m-%d}"


def _duration(seconds: float) -> str:
    if seconds < MINUTE:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds // MINUTE:.0f} min {seconds % MINUTE:.0f} s" if seconds < HOUR else f"{seconds / HOUR:.1f} h"


def _query(values: dict[str, Any]) -> str:
    """The query part of a URL. Values that are not given are left out."""
    return urlencode({name: value for name, value in values.items() if value not in (None, "")})


TEMPLATES = _environment()
