"""Messages between processes by Valkey's pub/sub: new work for sampling workers, and events of samples for the API.

Messages may get lost. The registry is the truth: the dispatcher announces waiting jobs again, and API processes read
the registry once a second while a request waits.
"""

import json
import logging
import select
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from service.registry.samples import Ended

WORK_CHANNEL = "timetuner:bell"
MODEL_CHANNEL = "timetuner:model-bell"
EVENTS_CHANNEL = "timetuner:samples"
WORKER_REQUESTED_KEY = "timetuner:bell-sent"
WORKER_REQUESTED_MILLISECONDS = 1000
WARMING_KEY = "timetuner:warming"
WARMING_SECONDS = 3600
SAMPLE_TASK, SAMPLE_QUEUE = "worker.serve_samples", "sampling"

logger = logging.getLogger(__name__)


def redis_url(broker_url: str) -> str:
    """A broker's URL as redis-py spells it. Celery has another scheme for Unix sockets."""
    return broker_url.replace("redis+socket://", "unix://", 1)


class WorkSubscription:
    """A worker's subscription to the channel of new work. It tells the worker when to look for jobs."""

    def __init__(self, pubsub: Any) -> None:
        self._pubsub = pubsub

    def has_message(self, seconds: float = 0.0) -> bool:
        """Whether new work was announced since the last call, or is within `seconds`."""
        received, deadline = False, time.monotonic() + seconds
        while True:
            try:
                if not seconds and not received and self._is_silent():
                    return False
                left = 0.0 if received else max(0.0, deadline - time.monotonic())
                message = self._pubsub.get_message(ignore_subscribe_messages=True, timeout=left)
            except redis.RedisError:
                time.sleep(seconds)
                return True  # The broker is unreachable, so the worker must look into the registry.
            received = received or message is not None
            if message is None and (received or time.monotonic() >= deadline):
                return received

    def _is_silent(self) -> bool:
        """Whether the socket has nothing to read. Workers ask before every step, so this is one system call."""
        socket = getattr(self._pubsub.connection, "_sock", None)
        if socket is None:
            return False
        poll = select.poll()
        poll.register(socket, select.POLLIN)
        return not poll.poll(0)


class Bus:
    """The sending side, for any thread."""

    def __init__(self, celery: Celery, broker_url: str) -> None:
        self._celery = celery
        self._redis = redis.Redis.from_url(redis_url(broker_url), socket_connect_timeout=2, socket_timeout=5)

    def announce_samples(self) -> None:
        """Tell the workers that are sampling of new jobs. If none is, request a worker."""
        try:
            if not self._redis.publish(WORK_CHANNEL, b""):
                self.request_worker()
        except redis.RedisError:
            logger.warning("the broker cannot be reached; the dispatcher will ring")

    def request_worker(self) -> None:
        """Send a task that makes one more worker sample, unless one was sent a moment ago."""
        try:
            if not self.is_worker_requested() and self._redis.set(
                WORKER_REQUESTED_KEY, b"", nx=True, px=WORKER_REQUESTED_MILLISECONDS
            ):
                self._celery.send_task(SAMPLE_TASK, queue=SAMPLE_QUEUE)
        except (redis.RedisError, OperationalError, OSError):
            logger.warning("the broker cannot be reached; the dispatcher will ring")

    def announce_models(self) -> None:
        """Tell all workers that there is a model to describe. The first to claim it has it."""
        try:
            self._redis.publish(MODEL_CHANNEL, b"")
        except redis.RedisError:
            logger.warning("the broker cannot be reached; the dispatcher will tell the workers")

    def is_worker_requested(self) -> bool:
        """Whether a request for a worker is in the queue."""
        try:
            return bool(self._redis.llen(SAMPLE_QUEUE))
        except redis.RedisError:
            return False

    def mark_warming(self, place: str) -> bool:
        """Mark that a model is loaded before it is needed. False if it is marked, or the broker cannot be reached.

        The mark outlives the process, so that one that ends by loading does not do so at each of its starts.
        """
        try:
            return bool(self._redis.set(f"{WARMING_KEY}:{place}", b"", nx=True, ex=WARMING_SECONDS))
        except redis.RedisError:
            return False

    def unmark_warming(self, place: str) -> None:
        """The model was loaded, or could not be: in any case the process goes on."""
        try:
            self._redis.delete(f"{WARMING_KEY}:{place}")
        except redis.RedisError:
            logger.warning("the broker cannot be reached")

    def worker_started(self) -> None:
        """A worker has taken the request, so the next request is for another worker."""
        try:
            self._redis.delete(WORKER_REQUESTED_KEY)
        except redis.RedisError:
            logger.warning("the broker cannot be reached")

    def publish(self, event: dict[str, Any]) -> None:
        """Send an event to every API process."""
        try:
            self._redis.publish(EVENTS_CHANNEL, json.dumps(event))
        except redis.RedisError:
            logger.warning("the broker cannot be reached; who waits will look into the registry")

    def publish_ends(self, ends: Iterable[Ended]) -> None:
        """Tell every API process how jobs ended."""
        ends = list(ends)
        rows = [[e.job_id, e.state, e.artifact, e.artifact_row, e.error, e.num_images] for e in ends]
        flagged = {e.job_id: e.flagged for e in ends if e.flagged is not None}
        if rows:  # Processes of the release before read rows of this length.
            self.publish({"ended": rows, **({"flagged": flagged} if flagged else {})})

    @contextmanager
    def subscribe_to_work(self, channel: str = WORK_CHANNEL) -> Iterator[WorkSubscription]:
        """A subscription that begins now and ends with the context."""
        pubsub = self._redis.pubsub()  # type: ignore[no-untyped-call]
        try:
            try:
                pubsub.subscribe(channel)
                pubsub.get_message(timeout=2.0)  # This reads the broker's confirmation of the subscription.
            except redis.RedisError:
                logger.warning("the broker cannot be reached; looking into the registry instead")
            yield WorkSubscription(pubsub)
        finally:
            pubsub.close()

    def close(self) -> None:
        self._redis.close()
