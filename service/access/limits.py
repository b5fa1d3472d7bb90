"""Requests per minute of each API key, counted in the broker for all API processes."""

import logging
import math
import time

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis import RedisError

from service.http.errors import KeyLimitError
from service.registry.tables import ApiKey
from service.shared.signals import redis_url

PREFIX = "timetuner:requests"

logger = logging.getLogger(__name__)


class RateLimits:
    """Limits the requests of each key in any 60 seconds. Without the broker, each API process counts by itself."""

    def __init__(self, broker_url: str) -> None:
        url = redis_url(broker_url).replace("unix://", "redis+unix://", 1)
        shared = RedisStorage(
            url, implementation="redispy", key_prefix=PREFIX, socket_connect_timeout=1, socket_timeout=1
        )
        self._shared = MovingWindowRateLimiter(shared)
        self._own = MovingWindowRateLimiter(MemoryStorage())

    async def count(self, key: ApiKey) -> None:
        """Count a request. Raises: KeyLimitError."""
        if key.requests_per_minute is None:
            return
        item = RateLimitItemPerMinute(key.requests_per_minute)
        try:
            seconds = await _hit(self._shared, item, key.id)
        except RedisError:
            logger.warning("the broker cannot be reached; counting the requests of this process alone")
            seconds = await _hit(self._own, item, key.id)
        if seconds is not None:
            detail = f"this API key has made {key.requests_per_minute} requests in 60 s (requests_per_minute)"
            raise KeyLimitError(f"{detail}; accepted: a new try in {max(1, math.ceil(seconds))} s", seconds)


async def _hit(limiter: MovingWindowRateLimiter, item: RateLimitItemPerMinute, key_id: str) -> float | None:
    """Count a request if it fits, and return None; otherwise return the seconds until one fits."""
    if await limiter.hit(item, key_id):
        return None
    return (await limiter.get_window_stats(item, key_id)).reset_time - time.time()
