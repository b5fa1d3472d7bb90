"""Refusing request bodies that are too large, before they are read or while they stream in."""

from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import problem_response

UPLOAD_PATH = "/v1/models"


class BodyLimitMiddleware:
    """413 for bodies over `max_json_bytes`; for multipart bodies of `UPLOAD_PATH`, over `max_body_bytes`."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_json_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_json_bytes = max_json_bytes

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
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
            return message

        await self.app(scope, limited_receive, send)
