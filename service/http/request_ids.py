"""Every request gets an id: the client's own if it is well formed, or a new one."""

import logging
import re
import time
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.errors import problem_response
from service.registry.database import is_away
from service.registry.types import new_id
from service.shared.logs import about

logger = logging.getLogger(__name__)

HEADER = "X-Request-Id"
WELL_FORMED = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
UNLOGGED_PATHS = ("/healthz", "/readyz", "/metrics")


class RequestIdMiddleware:
    """Puts the id into the response's header, problem documents, logs and the jobs that the request makes.

    Unexpected errors are logged here. Their details are not sent to the client.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get(HEADER, "")
        if not WELL_FORMED.fullmatch(request_id):
            request_id = new_id("req")
        began, status = time.perf_counter(), 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with about(request_id=request_id):
            try:
                await self.app(scope, receive, tell)
            except ClientDisconnect:
                pass  # The client does not wait for a response any more.
            except Exception as error:
                logger.exception("request failed", extra={"method": scope["method"], "path": scope["path"]})
                if status:
                    raise  # The response has begun, so the server can only close the connection.
                await _answer(error)(scope, receive, tell)
            if logger.isEnabledFor(logging.INFO) and scope["path"] not in UNLOGGED_PATHS:
                seconds = round(time.perf_counter() - began, 6)
                facts = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": seconds}
                logger.info("request", extra=facts)


def _answer(error: Exception) -> ASGIApp:
    if is_away(error):
        detail = "the database cannot be used at the moment; accepted: a new try"
        return problem_response(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"Retry-After": "1"})
    detail = "an unexpected error; the server's log has it, by the request id"
    return problem_response(HTTPStatus.INTERNAL_SERVER_ERROR, detail)
