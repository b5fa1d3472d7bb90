"""Push between processes, by Valkey's pub/sub: a bell for workers, and news for those who wait for samples.

No promise hangs on a message: the registry is the truth, the dispatcher rings again, who waits looks there too.
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

BELL = "timetuner:bell"
MODEL_BELL = "timetuner:model-bell"
NEWS = "timetuner:samples"
SENT = "timetuner:bell-sent"
SENT_MILLISECONDS = 1000
SAMPLE_TASK, SAMPLE_QUEUE = "worker.serve_samples", "sampling"

logger = logging.getLogger(__name__)


def redis_url(broker_url: str) -> str:
    """A broker's URL as redis-py spells it: Celery has a word of its own for Unix sockets."""
    return broker_url.replace("redis+socket://", "unix://", 1)


class Bell:
    """A worker's ear: whether there may be something new to take."""

    def __init__(self, pubsub: Any) -> None:
        self._pubsub = pubsub

    def rung(self, seconds: float = 0.0) -> bool:
        """Whether it was rung since the last look, or is within `seconds`."""
        heard, deadline = False, time.monotonic() + seconds
        while True:
            try:
                if not seconds and not heard and self._is_silent():
                    return False
                left = 0.0 if heard else max(0.0, deadline - time.monotonic())
                message = self._pubsub.get_message(ignore_subscribe_messages=True, timeout=left)
            except redis.RedisError:
                return True  # deaf: better to look
            heard = heard or message is not None
            if message is None and (heard or time.monotonic() >= deadline):
                return heard

    def _is_silent(self) -> bool:
        """Whether nothing has come: a system call, as samplers ask before every step; what came before was read."""
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

    def ring(self) -> None:
        """Tell one worker that there is something to sample: those at it, or else one that waits for tasks."""
        try:
            if not self._redis.publish(BELL, b""):
                self.wake()
        except redis.RedisError:
            logger.warning("the broker cannot be reached; the dispatcher will ring")

    def wake(self) -> None:
        """Call one more worker to sampling, unless one was just called."""
        try:
            if not self.is_called() and self._redis.set(SENT, b"", nx=True, px=SENT_MILLISECONDS):
                self._celery.send_task(SAMPLE_TASK, queue=SAMPLE_QUEUE)
        except (redis.RedisError, OperationalError, OSError):
            logger.warning("the broker cannot be reached; the dispatcher will ring")

    def ring_for_models(self) -> None:
        """Tell all workers that there is a model to describe; the first to claim it has it."""
        try:
            self._redis.publish(MODEL_BELL, b"")
        except redis.RedisError:
            logger.warning("the broker cannot be reached; the dispatcher will ring")

    def is_called(self) -> bool:
        """Whether a call to sampling waits for somebody to hear it."""
        try:
            return bool(self._redis.llen(SAMPLE_QUEUE))
        except redis.RedisError:
            return False

    def answered(self) -> None:
        """A call was heard: the next one is for another worker."""
        try:
            self._redis.delete(SENT)
        except redis.RedisError:
            logger.warning("the broker cannot be reached")

    def tell(self, news: dict[str, Any]) -> None:
        """Tell every API process."""
        try:
            self._redis.publish(NEWS, json.dumps(news))
        except redis.RedisError:
            logger.warning("the broker cannot be reached; who waits will look into the registry")

    def tell_ended(self, ends: Iterable[Ended]) -> None:
        """Tell how jobs ended."""
        rows = [[e.job_id, e.state, e.artifact, e.artifact_row, e.error, e.num_images] for e in ends]
        if rows:
            self.tell({"ended": rows})

    @contextmanager
    def bell(self, channel: str = BELL) -> Iterator[Bell]:
        """A subscription to a channel from now on."""
        pubsub = self._redis.pubsub()  # type: ignore[no-untyped-call]
        try:
            try:
                pubsub.subscribe(channel)
                pubsub.get_message(timeout=2.0)  # that we are subscribed
            except redis.RedisError:
                logger.warning("the broker cannot be reached; looking into the registry instead")
            yield Bell(pubsub)
        finally:
            pubsub.close()

    def close(self) -> None:
        self._redis.close()
