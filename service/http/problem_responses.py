"""Answers in another form in place of problem documents, whichever part of the service these come from."""

import json
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROBLEM_TYPE = b"application/problem+json"


class ProblemMiddleware:
    """Replaces problem documents by answers of a subclass, for the requests that `applies_to` chooses."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def applies_to(self, scope: Scope) -> bool:
        """Whether the client of a request gets another form."""
        raise NotImplementedError

    def answer(self, scope: Scope, start: Message, problem: dict[str, Any]) -> Response:
        """The answer in place of a problem document, whose response began with `start`."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.applies_to(scope):
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
                    await self.answer(scope, start, json.loads(body))(scope, receive, send)

        await self.app(scope, receive, converted)


def _is_problem(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(PROBLEM_TYPE) for name, value in start["headers"])
