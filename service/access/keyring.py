"""API keys as requests present them. Each is looked up at most once a second and cached in between."""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError

from service.http.errors import UnauthenticatedError
from service.registry.keys import KEY_TEXT, LAST_USED_RESOLUTION_SECONDS, any_key, find_key, hash_secret, note_use
from service.registry.tables import ApiKey
from service.registry.types import utc_now
from service.state import AppState

CACHE_SECONDS = 1.0  # A revoked key may still be accepted for this long.
MAX_CACHED_KEYS = 4096  # The cache is emptied when it reaches this size.

logger = logging.getLogger(__name__)


class KeyRing:
    """The keys that one API process knows. All methods run in its event loop."""

    def __init__(self, state: AppState) -> None:
        self._registry = state.registry
        self._run_write = state.run_write
        self._mode = state.settings.auth
        self._cached: dict[str, tuple[float, asyncio.Future[Any]]] = {}
        self._noting: set[asyncio.Task[None]] = set()

    async def is_needed(self, authorization: str | None) -> bool:
        """Whether a request must have a key. With `auto`, it must if any key exists or if it presents one."""
        if self._mode == "auto":
            return authorization is not None or await self._cached_read("", self._read_any)
        return self._mode == "on"

    async def find(self, authorization: str | None) -> ApiKey:
        """The key of an Authorization header. Raises: UnauthenticatedError."""
        if authorization is None:
            raise UnauthenticatedError("this request has no API key")
        scheme, _, text = authorization.partition(" ")
        match = KEY_TEXT.fullmatch(text.strip())
        if scheme.lower() != "bearer" or match is None:
            raise UnauthenticatedError("the Authorization header has no API key")
        prefix, secret = match.groups()
        key: ApiKey | None = await self._cached_read(prefix, lambda: self._read(prefix))
        if key is None or not hmac.compare_digest(key.secret_hash, hash_secret(secret)):
            raise UnauthenticatedError("there is no such API key")
        now = utc_now()
        if key.revoked_at is not None:
            raise UnauthenticatedError(f"the API key {key.id} was revoked")
        if key.expires_at is not None and key.expires_at <= now:
            raise UnauthenticatedError(f"the API key {key.id} expired at {key.expires_at:%Y-%m-%dT%H:%M:%SZ}")
        if key.last_used_at is None or now - key.last_used_at > timedelta(seconds=LAST_USED_RESOLUTION_SECONDS):
            key.last_used_at = now  # The cached row is changed, too, so that the use is stored once.
            task = asyncio.create_task(self._run_write(self._note_use, key.id, now))
            self._noting.add(task)
            task.add_done_callback(self._noting.discard)
        return key

    async def _cached_read(self, name: str, read: Callable[[], Any]) -> Any:
        """The result of `read`, cached for `CACHE_SECONDS`. Simultaneous requests share one read."""
        now = time.monotonic()
        cached = self._cached.get(name)
        if cached is None or now - cached[0] > CACHE_SECONDS:
            if len(self._cached) >= MAX_CACHED_KEYS:
                self._cached.clear()
            cached = now, asyncio.ensure_future(run_in_threadpool(read))
            self._cached[name] = cached
        return await asyncio.shield(cached[1])  # A client that hangs up must not cancel the read for the others.

    def _read(self, prefix: str) -> ApiKey | None:
        with self._registry.read() as session:
            return find_key(session, prefix)

    def _read_any(self) -> bool:
        with self._registry.read() as session:
            return any_key(session)

    def _note_use(self, key_id: str, now: datetime) -> None:
        try:
            with self._registry.write() as session:
                note_use(session, key_id, now)
        except SQLAlchemyError:
            logger.warning("the last use of the API key %s could not be noted", key_id)
