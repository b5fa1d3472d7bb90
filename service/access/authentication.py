"""Authentication: find out who makes a request before its body is read, and record refusals."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

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

# Paths that nobody may use without a key. Of all others, the web page's endpoints check the caller themselves.
GUARDED_PREFIXES = ("/v1/", "/openai/", "/metrics")
# Paths that everybody may use. A cookie is not looked at.
OPEN_PREFIXES = ("/docs", "/redoc", "/openapi.json", "/healthz", "/readyz", "/static/", "/login")
HEALTH_PATH, HEALTH_SECONDS = "/healthz", 0.5
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Refusals that are recorded: each key has this limit, and so has each status of requests without a valid key.
RECORDED_REFUSALS = RateLimitItemPerMinute(60)

logger = logging.getLogger(__name__)


class AuthenticationMiddleware:
    """401 for requests without a valid key, if one is needed; 429 for keys that ask too often.

    Requests refused for other reasons, but with a valid key, get an entry in the audit log. Requests refused here only
    get a line in the process's log, so that nobody can fill the database without a key. Both are limited per minute.
    """

    def __init__(self, app: ASGIApp, state: Callable[[], AppState], access: Callable[[], AccessState]) -> None:
        self.app = app
        self.state, self.access = state, access
        self._recorded = FixedWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            caller = await self._caller(scope)
        except ServiceError as refusal:
            if self._recorded.hit(RECORDED_REFUSALS, f"{refusal.status}"):
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
        if refused and self._recorded.hit(RECORDED_REFUSALS, caller.key.id):
            await self.state().run_write(self._write, caller, scope, status)

    async def _caller(self, scope: Scope) -> Caller | None:
        """The caller, or None on paths that need none. Raises: UnauthenticatedError, ForbiddenError, KeyLimitError."""
        headers, access = Headers(scope=scope), self.access()
        authorization = headers.get("authorization")
        if scope["path"] == HEALTH_PATH:
            with suppress(TimeoutError):  # Its answer must not wait for the database, to look whether there are keys.
                async with asyncio.timeout(HEALTH_SECONDS):
                    if not await access.keys.is_needed(authorization):
                        check_local(scope, headers)
            return None
        if not await access.keys.is_needed(authorization):
            check_local(scope, headers)
            return Caller(None, request_id())
        guarded = scope["path"].startswith(GUARDED_PREFIXES)
        by_cookie = None if authorization else cookie_authorization(headers)
        if not guarded and (by_cookie is None or scope["path"].startswith(OPEN_PREFIXES)):
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
    """The path as it was sent. Decoded, it could hold line breaks or characters that no database stores."""
    path: bytes = scope.get("raw_path") or b""
    return path.decode("ascii", "backslashreplace")
