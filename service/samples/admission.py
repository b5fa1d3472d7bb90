"""Admission control of sampling: whether there is room for one more request, and if not, when there will be."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from fastapi.concurrency import run_in_threadpool
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.callers import CALLER_IN_SCOPE, Caller
from service.http.errors import TooManyRequestsError, problem_response
from service.registry.database import Registry
from service.registry.tables import JobState, SampleJob

MAX_COUNT_AGE_SECONDS = 0.1  # A count of the queue that is older is made anew.
STALE_SECONDS = 1.0  # The estimate since the last count is not trusted for longer.
RATE_MEMORY_SECONDS = 10.0  # Older measurements of the rate lose weight with this time constant.
# A rate is forgotten once nothing has ended for this many times as long as it took between the last two ends.
MAX_INTERVALS_WITHOUT_END = 3
DEFAULT_RETRY_SECONDS = 10.0  # Clients are told to wait this long while no rate has been measured.

logger = logging.getLogger(__name__)


Counts = dict[str | None, tuple[int, int]]  # Numbers of jobs and of their images, by owner.


class Admission:
    """The queue of samples, counted every `MAX_COUNT_AGE_SECONDS` and estimated in between, and how fast it is served.

    The rate is measured only while there is a queue, so that it is the workers' capacity and not the demand. It is
    measured when jobs end. If none has for long, the rate is forgotten: it could refuse all requests for ever.
    """

    def __init__(
        self, registry: Registry, max_jobs: int, max_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._max_jobs, self._max_seconds = max_jobs, max_seconds
        self._jobs = self._images = 0
        # The same by owner. Ends are told without their owner, so these fall only when the registry is counted.
        self._of_owners: Counts = {}
        self._unstored: Counts = {}  # Admitted jobs that are not stored yet, so that the registry cannot count them.
        self._counted_at = -math.inf
        self._counting: asyncio.Task[None] | None = None
        self._served, self._seconds = 0.0, 0.0  # Images and the time they took. Older ones have less weight.
        self._last_end: float | None = None
        self._measured_at, self._interval = -math.inf, 0.0  # The last measurement, and the seconds that it was over.

    @property
    def rate(self) -> float | None:
        """Images per second, or None if nothing was measured, or not for long."""
        memory = max(self._max_seconds, MAX_INTERVALS_WITHOUT_END * self._interval)
        if self._clock() - self._measured_at > memory:
            self._served, self._seconds = 0.0, 0.0
        return self._served / self._seconds if self._seconds > 0 else None

    async def refusal(self, owner: str | None = None) -> float | None:
        """None if there is room for a request of this API key, or the seconds until there will be.

        A key may have as many jobs and images waiting as there is room left. So it can never fill the queue: alone it
        has half of it, two have a third each. Where no keys are needed, there is nobody to leave room for.

        A request is refused only by a fresh count. It is admitted by an older one without waiting, unless no request
        came for a while: the estimate would count that time as time in which jobs were served.
        """
        if self._clock() - self._counted_at > STALE_SECONDS or self._seconds_to_room(owner) > 0:
            self.refresh()
            if self._counting is not None:
                await asyncio.shield(self._counting)
        return self._seconds_to_room(owner) or None

    def refresh(self) -> None:
        """Make an old count anew in the background, for the next requests."""
        if self._clock() - self._counted_at > MAX_COUNT_AGE_SECONDS:
            self._counting = self._counting or asyncio.create_task(self._recount())

    def _seconds_to_room(self, owner: str | None = None) -> float:
        """Seconds until there is room, zero if there is."""
        rate = self.rate
        own_jobs, own_images = (0, 0) if owner is None else self._of_owners.get(owner, (0, 0))
        jobs, images = self._jobs + own_jobs, self._images + own_images
        excess = (jobs + 1 - self._max_jobs) / max(jobs, 1) * images
        if rate is not None:
            excess = max(excess, images - self._max_seconds * rate)
        if excess <= 0:
            return 0.0
        return DEFAULT_RETRY_SECONDS if rate is None else excess / rate

    async def _recount(self) -> None:
        try:
            counts = await run_in_threadpool(self._count)
            for owner, (jobs, images) in self._unstored.items():
                _add(counts, owner, jobs, images)
            self._of_owners = counts
            self._jobs = sum(jobs for jobs, _ in counts.values())
            self._images = sum(images for _, images in counts.values())
            self._counted_at = self._clock()
            if self._jobs == 0:
                self._last_end = None
        except SQLAlchemyError:
            logger.warning("the queue of samples cannot be counted")  # Requests fail when they are stored.
        finally:
            self._counting = None

    @contextmanager
    def admit(self, images: int, owner: str | None = None) -> Iterator[None]:
        """A context in which a request for so many images is stored. They count from now on, unless that fails."""
        self._jobs, self._images = self._jobs + 1, self._images + images
        _add(self._of_owners, owner, 1, images)
        _add(self._unstored, owner, 1, images)
        try:
            yield
        except BaseException:
            self.spared(images, owner)
            raise
        finally:
            _add(self._unstored, owner, -1, -images)

    def spared(self, images: int, owner: str | None = None) -> None:
        """A job that was admitted needs no work, because its images exist or it could not be stored."""
        self._jobs, self._images = max(0, self._jobs - 1), max(0, self._images - images)
        _add(self._of_owners, owner, -1, -images)

    def ended(self, images: int, jobs: int = 1) -> None:
        """Note that jobs ended together, and how many images they had.

        Noted one by one, all but the first would seem to have taken no time.
        """
        now = self._clock()
        if self._last_end is not None and self._jobs > 0:
            seconds = now - self._last_end
            keep = math.exp(-seconds / RATE_MEMORY_SECONDS)
            self._served, self._seconds = keep * self._served + images, keep * self._seconds + seconds
            self._measured_at, self._interval = now, seconds
        self._jobs, self._images = max(0, self._jobs - jobs), max(0, self._images - images)
        self._last_end = now if self._jobs > 0 else None

    def _count(self) -> Counts:
        query = select(SampleJob.owner, func.count(), func.sum(SampleJob.num_images))
        query = query.where(SampleJob.state == JobState.QUEUED, SampleJob.num_parts == 0).group_by(SampleJob.owner)
        with self._registry.read() as session:
            return {owner: (jobs, int(images)) for owner, jobs, images in session.execute(query)}


def _add(counts: Counts, owner: str | None, jobs: int, images: int) -> None:
    """Add to an owner's counts, which never fall below zero. An owner who has nothing is left out."""
    old_jobs, old_images = counts.get(owner, (0, 0))
    counts[owner] = max(0, old_jobs + jobs), max(0, old_images + images)
    if counts[owner] == (0, 0):
        del counts[owner]


class AdmissionMiddleware:
    """Answers 429 to requests for samples while there is no room, before their body is read."""

    def __init__(self, app: ASGIApp, admission: Callable[[], Admission], paths: Collection[str]) -> None:
        self.app = app
        self.admission = admission
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self.paths:
            caller: Caller | None = scope.get(CALLER_IN_SCOPE)
            seconds = await self.admission().refusal(caller.owner if caller else None)
            if seconds is not None:
                await _too_many(seconds)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _too_many(seconds: float) -> ASGIApp:
    retry_after = max(1, math.ceil(seconds))
    detail = f"too many samples are waiting; accepted: a new try in {retry_after} s, when there will be room"
    return problem_response(TooManyRequestsError.status, detail, headers={"Retry-After": str(retry_after)})
