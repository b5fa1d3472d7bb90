"""Events of sampling jobs: one subscription per API process passes them on to the requests that wait for them."""

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
from service.shared.signals import EVENTS_CHANNEL, redis_url

RECONNECT_SECONDS = 0.5

logger = logging.getLogger(__name__)

Progress = dict[str, Any]


class JobEvents:
    """Events of all sampling jobs, received while `run` runs. Followers of a job get its progress and then its end."""

    def __init__(self, broker_url: str, on_end: Callable[[int, int], None]) -> None:
        """Whenever jobs end, `on_end` is called with their number of images and their count."""
        self._url = redis_url(broker_url)
        self._on_end = on_end
        self._followers: dict[str, list[asyncio.Queue[Ended | Progress]]] = defaultdict(list)

    @contextmanager
    def follow(self, job_id: str) -> Iterator["asyncio.Queue[Ended | Progress]"]:
        """A queue of the job's events from now on."""
        queue: asyncio.Queue[Ended | Progress] = asyncio.Queue()
        self._followers[job_id].append(queue)
        try:
            yield queue
        finally:
            self._followers[job_id].remove(queue)
            if not self._followers[job_id]:
                del self._followers[job_id]

    async def run(self) -> None:
        """Receive events until cancelled. A broker that cannot be reached is tried again."""
        while True:
            connection = redis.asyncio.Redis.from_url(self._url)
            try:
                async with connection.pubsub() as pubsub:
                    await pubsub.subscribe(EVENTS_CHANNEL)
                    async for message in pubsub.listen():
                        if message["type"] == "message":
                            self._dispatch(json.loads(message["data"]))
            except (RedisError, OSError):
                logger.warning("the broker cannot be reached; looking into the registry instead")
            finally:
                await connection.aclose()
            await asyncio.sleep(RECONNECT_SECONDS)

    def _dispatch(self, event: dict[str, Any]) -> None:
        for job_id, (step, num_steps) in event.get("steps", {}).items():
            preview = event["previews"].get(job_id)
            self._send(job_id, {"step": step, "num_steps": num_steps, "preview": preview})
        ended, flagged = event.get("ended", ()), event.get("flagged", {})
        for job_id, state, artifact, row, error, _ in ended:
            self._send(job_id, Ended(job_id, JobState(state), artifact, row, error, flagged=flagged.get(job_id)))
        if ended:
            self._on_end(sum(num_images for *_, num_images in ended), len(ended))

    def _send(self, job_id: str, event: Ended | Progress) -> None:
        for queue in self._followers.get(job_id, ()):
            queue.put_nowait(event)
