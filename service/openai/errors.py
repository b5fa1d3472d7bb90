"""Errors under /openai/ in OpenAI's own form, whichever part of the service they come from."""

import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.openai.schemas import ErrorBody, ErrorDetail

PREFIX = "/openai/"
PROBLEM_TYPE = b"application/problem+json"
BAD_REQUESTS = (406, 413, 415, 422)  # OpenAI answers 400 to these. Its clients have no error for some of them.
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class OpenAIErrorMiddleware:
    """Turns problem documents into `{"error": {"message", "type", "param", "code"}}` on paths under /openai/."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
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
                    await _error(start, json.loads(body))(scope, receive, send)

        await self.app(scope, receive, converted)


def _is_problem(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(PROBLEM_TYPE) for name, value in start["headers"])


def _error(start: Message, problem: dict[str, Any]) -> JSONResponse:
    status: int = problem["status"]
    # The location of a fault is that of a field, such as ["body", "size"].
    loc = problem["errors"][0]["loc"] if problem["errors"] else []
    param = next((f"{part}" for part in loc[1:]), None) if loc[:1] in (["body"], ["query"], ["path"]) else None
    code = "model_not_found" if status == 404 and param == "model" else CODES.get(status)
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    answer = ErrorBody(error=ErrorDetail(message=problem["detail"], type=kind, param=param, code=code))
    response = JSONResponse(answer.model_dump(), 400 if status in BAD_REQUESTS else status)
    kept = [
        (name, value) for name, value in start["headers"] if name.lower() not in (b"content-type", b"content-length")
    ]
    response.raw_headers = [*response.raw_headers, *kept]
    return response
