"""Errors under /openai/ in OpenAI's own form, whichever part of the service they come from."""

from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Scope

from service.http.problem_responses import ProblemMiddleware
from service.openai.schemas import ErrorBody, ErrorDetail

PREFIX = "/openai/"
BAD_REQUESTS = (406, 413, 415, 422)  # OpenAI answers 400 to these. Its clients have no error for some of them.
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class OpenAIErrorMiddleware(ProblemMiddleware):
    """Turns problem documents into `{"error": {"message", "type", "param", "code"}}` on paths under /openai/."""

    def applies_to(self, scope: Scope) -> bool:
        return bool(scope["path"].startswith(PREFIX))

    def answer(self, scope: Scope, start: Message, problem: dict[str, Any]) -> Response:
        return _error(start, problem)


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
