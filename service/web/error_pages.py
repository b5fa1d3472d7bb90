"""Error pages: browsers get these in place of problem documents."""

import json
from typing import Any
from urllib.parse import quote

from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.web.rendering import TEMPLATES

PROBLEM_TYPE = b"application/problem+json"


class ErrorPageMiddleware:
    """Turns problem documents into pages for browsers. Those of the API, under /v1/ and /openai/, stay as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _wants_a_page(scope):
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def converted(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and _is_problem(message):
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _page(scope, start, json.loads(body))(scope, receive, send)

        await self.app(scope, receive, converted)


def _wants_a_page(scope: Scope) -> bool:
    return not scope["path"].startswith(("/v1/", "/openai/")) and "text/html" in Headers(scope=scope).get("accept", "")


def _is_problem(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(PROBLEM_TYPE) for name, value in start["headers"])


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
