"""Who makes a request, found out before anything else of it is read; and the refusals, written down."""

import logging
from collections.abc import Callable

from fastapi.concurrency import run_in_threadpool
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access.callers import CALLER_IN_SCOPE, Caller
from service.access.cookies import check_same_origin, cookie_authorization
from service.access.local import check_local
from service.access.state import AccessState
from service.http.errors import ServiceError, UnauthenticatedError, problem_response
from service.shared.logs import request_id
from service.state import AppState

GUARDED = ("/v1/", "/metrics")  # for nobody without a key; of the rest, the web page's endpoints say themselves
# For everybody, whatever their cookie is.
OPEN = ("/docs", "/redoc", "/openapi.json", "/healthz", "/readyz", "/static/", "/login")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
WRITTEN = RateLimitItemPerMinute(60)  # refusals of each key, and of each kind of those that are refused at once

logger = logging.getLogger(__name__)


class AuthenticationMiddleware:
    """401 for requests without a valid key, if one is needed; 429 for keys that ask too often.

    What else a key is refused is an entry of the audit log. Refusals here are lines of the process's log, as nobody
    should be able to fill the database without a key; of either only so many a minute.
    """

    def __init__(self, app: ASGIApp, state: Callable[[], AppState], access: Callable[[], AccessState]) -> None:
        self.app = app
        self.state, self.access = state, access
        self._written = FixedWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            caller = await self._caller(scope)
        except ServiceError as refusal:
            if self._written.hit(WRITTEN, f"{refusal.status}"):
                client = scope["client"] or ["a Unix socket"]
                logger.warning("%s %s from %s refused: %s", scope["method"], _path(scope), client[0], refusal.detail)
            answer = problem_response(refusal.status, refusal.detail, refusal.errors, refusal.headers)
            await answer(scope, receive, send)
            return
        scope[CALLER_IN_SCOPE] = caller
        if caller is None or caller.key is None:
            await self.app(scope, receive, send)
            return
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        await self.app(scope, receive, noting)
        refused = status == 403 or (scope["method"] not in SAFE_METHODS and 400 <= status < 500 and status != 429)
        if refused and self._written.hit(WRITTEN, caller.key.id):
            await run_in_threadpool(self._write, caller, scope, status)

    async def _caller(self, scope: Scope) -> Caller | None:
        """None where nobody asks. Raises: UnauthenticatedError, ForbiddenError, KeyLimitError."""
        headers, access = Headers(scope=scope), self.access()
        authorization = headers.get("authorization")
        if not await access.keys.is_needed(authorization):
            check_local(scope, headers)
            return Caller(None, request_id())
        guarded = scope["path"].startswith(GUARDED)
        by_cookie = None if authorization else cookie_authorization(headers)
        if not guarded and (by_cookie is None or scope["path"].startswith(OPEN)):
            return None
        try:
            key = await access.keys.find(authorization or by_cookie)
        except UnauthenticatedError:
            if guarded:
                raise
            return None
        if by_cookie and scope["method"] not in SAFE_METHODS:
            check_same_origin(headers)
        await access.rates.count(key)
        return Caller(key, request_id())

    def _write(self, caller: Caller, scope: Scope, status: int) -> None:
        action = getattr(scope.get("route"), "operation_id", None) or scope["method"]
        try:
            with self.state().registry.write() as session:
                caller.record(session, action, _path(scope), f"refused: {status}")
        except SQLAlchemyError:
            logger.warning("a refusal of %s could not be written into the audit log", caller.owner)


def _path(scope: Scope) -> str:
    """As it was sent: decoded, it could have line breaks, or what no database keeps."""
    path: bytes = scope.get("raw_path") or b""
    return path.decode("ascii", "backslashreplace")
