"""What workers tell of samples: heard once per process, passed on to the requests that wait."""

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis.asyncio
from redis import RedisError

from service.registry.samples import Ended
from service.registry.tables import JobState
from service.shared.signals import NEWS, redis_url

RECONNECT_SECONDS = 0.5

logger = logging.getLogger(__name__)

Progress = dict[str, Any]


class News:
    """Listens as long as `run` runs. Who follows a job gets its progress, and last its end."""

    def __init__(self, broker_url: str, on_end: Callable[[int, int], None]) -> None:
        """`on_end` is told how many images are done, of how many jobs, whenever some are."""
        self._url = redis_url(broker_url)
        self._on_end = on_end
        self._followers: dict[str, list[asyncio.Queue[Ended | Progress]]] = defaultdict(list)

    @contextmanager
    def follow(self, job_id: str) -> Iterator["asyncio.Queue[Ended | Progress]"]:
        """What is told of a job from now on."""
        queue: asyncio.Queue[Ended | Progress] = asyncio.Queue()
        self._followers[job_id].append(queue)
        try:
            yield queue
        finally:
            self._followers[job_id].remove(queue)
            if not self._followers[job_id]:
                del self._followers[job_id]

    async def run(self) -> None:
        """Until cancelled; a broker that is away is tried again."""
        while True:
            connection = redis.asyncio.Redis.from_url(self._url)
            try:
                async with connection.pubsub() as pubsub:
                    await pubsub.subscribe(NEWS)
                    async for message in pubsub.listen():
                        if message["type"] == "message":
                            self._pass_on(json.loads(message["data"]))
            except (RedisError, OSError):
                logger.warning("the broker cannot be reached; looking into the registry instead")
            finally:
                await connection.aclose()
            await asyncio.sleep(RECONNECT_SECONDS)

    def _pass_on(self, news: dict[str, Any]) -> None:
        for job_id, (step, num_steps) in news.get("steps", {}).items():
            preview = news["previews"].get(job_id)
            self._tell(job_id, {"step": step, "num_steps": num_steps, "preview": preview})
        ended = news.get("ended", ())
        for job_id, state, artifact, row, error, _ in ended:
            self._tell(job_id, Ended(job_id, JobState(state), artifact, row, error))
        if ended:
            self._on_end(sum(num_images for *_, num_images in ended), len(ended))

    def _tell(self, job_id: str, what: Ended | Progress) -> None:
        for queue in self._followers.get(job_id, ()):
            queue.put_nowait(what)
