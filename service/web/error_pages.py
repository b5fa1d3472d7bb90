"""Error pages: browsers get these in place of problem documents."""

from typing import Any
from urllib.parse import quote

from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.datastructures import Headers
from starlette.types import Message, Scope

from service.http.problem_responses import ProblemMiddleware
from service.web.rendering import TEMPLATES


class ErrorPageMiddleware(ProblemMiddleware):
    """Turns problem documents into pages for browsers. Those of the API, under /v1/ and /openai/, stay as they are."""

    def applies_to(self, scope: Scope) -> bool:
        return _wants_a_page(scope)

    def answer(self, scope: Scope, start: Message, problem: dict[str, Any]) -> Response:
        return _page(scope, start, problem)


def _wants_a_page(scope: Scope) -> bool:
    return not scope["path"].startswith(("/v1/", "/openai/")) and "text/html" in Headers(scope=scope).get("accept", "")


def _page(scope: Scope, start: Message, problem: dict[str, Any]) -> Response:
    by_htmx = "HX-Request" in Headers(scope=scope)
    headers = {
        name: value for name, value in Headers(raw=start["headers"]).items() if name in ("retry-after", "x-request-id")
    }
    if start["status"] == 401 and scope["path"] != "/login":
        login = f"/login?next={quote(scope['path'])}" if scope["method"] == "GET" and not by_htmx else "/login"
        return Response(status_code=204, headers={"HX-Redirect": login}) if by_htmx else RedirectResponse(login, 303)
    template = "error_part.html" if by_htmx else "error.html"
    shared = {"path": scope["path"], "caller": None, "by_cookie": False}
    content = TEMPLATES.get_template(template).render(problem=problem, **shared)
    return HTMLResponse(content, start["status"], headers)
