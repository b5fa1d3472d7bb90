"""Middleware that refuses request bodies that are too large or too slow."""

import asyncio
import time
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.errors import problem_response

UPLOAD_PATH = "/v1/models"
MIN_BYTES_PER_SECOND = 1024  # The least average rate after the first `body_seconds`.


class BodyLimitMiddleware:
    """Answers 413 to bodies over `max_json_bytes`, or over `max_body_bytes` for multipart bodies of `UPLOAD_PATH`.

    Answers 408 if nothing comes for `body_seconds`, or if the body takes longer than that and a second per
    `MIN_BYTES_PER_SECOND`. Only the time in which the application waits for the body counts.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_json_bytes: int, body_seconds: float) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_json_bytes = max_json_bytes
        self.body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        multipart = headers.get("content-type", "").lower().startswith("multipart/form-data")
        upload = multipart and scope["path"] == UPLOAD_PATH
        limit = self.max_body_bytes if upload else self.max_json_bytes
        detail = f"the body is too large; accepted: up to {limit} bytes"
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            await problem_response(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)(scope, receive, send)
            return
        received, waited, more = 0, 0.0, True

        async def limited_receive() -> Message:
            nonlocal received, waited, more
            if not more:
                # The body is complete. Later messages only report a disconnect, which has no time limit.
                return await receive()
            left = self.body_seconds - max(0.0, waited - received / MIN_BYTES_PER_SECOND)
            began = time.monotonic()
            try:
                async with asyncio.timeout(left):
                    message = await receive()
            except TimeoutError:
                slow = f"the body came too slowly; accepted: {MIN_BYTES_PER_SECOND} bytes per second"
                raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, slow) from None
            waited += time.monotonic() - began
            received += len(message.get("body", b""))
            more = message.get("more_body", False)
            if received > limit:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
            return message

        await self.app(scope, limited_receive, send)
