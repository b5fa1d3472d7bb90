"""Keys as requests present them, looked up once a second and remembered in between."""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Literal

from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError

from service.http.errors import UnauthenticatedError
from service.registry.database import Registry
from service.registry.keys import KEY_TEXT, USED_SECONDS, any_key, find_key, hash_secret, note_use
from service.registry.tables import ApiKey
from service.registry.types import utc_now

REMEMBER_SECONDS = 1.0  # so long a revoked key may still be accepted
REMEMBERED = 4096  # keys, before they are forgotten

AuthMode = Literal["auto", "on", "off"]

logger = logging.getLogger(__name__)


class KeyRing:
    """For the event loop of one API process."""

    def __init__(self, registry: Registry, mode: AuthMode) -> None:
        self._registry = registry
        self._mode = mode
        self._remembered: dict[str, tuple[float, asyncio.Future[Any]]] = {}
        self._noting: set[asyncio.Task[None]] = set()

    async def is_needed(self, authorization: str | None) -> bool:
        """Whether a request must have a key: by `auto`, if any was ever made, or it claims to have one."""
        if self._mode == "auto":
            return authorization is not None or await self._recall("", self._read_any)
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
        key: ApiKey | None = await self._recall(prefix, lambda: self._read(prefix))
        if key is None or not hmac.compare_digest(key.secret_hash, hash_secret(secret)):
            raise UnauthenticatedError("there is no such API key")
        now = utc_now()
        if key.revoked_at is not None:
            raise UnauthenticatedError(f"the API key {key.id} was revoked")
        if key.expires_at is not None and key.expires_at <= now:
            raise UnauthenticatedError(f"the API key {key.id} expired at {key.expires_at:%Y-%m-%dT%H:%M:%SZ}")
        if key.last_used_at is None or now - key.last_used_at > timedelta(seconds=USED_SECONDS):
            key.last_used_at = now  # as remembered: once is enough
            task = asyncio.create_task(run_in_threadpool(self._note_use, key.id, now))
            self._noting.add(task)
            task.add_done_callback(self._noting.discard)
        return key

    async def _recall(self, name: str, read: Callable[[], Any]) -> Any:
        """What was read less than `REMEMBER_SECONDS` ago; requests that come at the same time share one look."""
        now = time.monotonic()
        remembered = self._remembered.get(name)
        if remembered is None or now - remembered[0] > REMEMBER_SECONDS:
            if len(self._remembered) >= REMEMBERED:
                self._remembered.clear()
            remembered = now, asyncio.ensure_future(run_in_threadpool(read))
            self._remembered[name] = remembered
        return await asyncio.shield(remembered[1])  # a client that hangs up must not take the look from the others

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
