"""Whether there is room for one more request for samples, and if not, when there will be."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi.concurrency import run_in_threadpool
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.errors import TooManyRequestsError, problem_response
from service.registry.database import Registry
from service.registry.tables import JobState, SampleJob

LOOK_SECONDS = 0.1  # how old the count of the queue may be
LULL_SECONDS = 1.0  # without requests: what was reckoned before says little of the queue now
MEMORY_SECONDS = 10.0  # how far back the measured rate looks
UNKNOWN_SECONDS = 10.0  # what to say while nothing has been measured

logger = logging.getLogger(__name__)


class Admission:
    """The queue of samples, counted every `LOOK_SECONDS` and reckoned in between; and how fast it is served.

    The rate is measured while there is a queue: it is what the workers can do, not what they are asked for.
    """

    def __init__(
        self, registry: Registry, max_jobs: int, max_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._max_jobs, self._max_seconds = max_jobs, max_seconds
        self._jobs = self._images = 0
        self._unstored_jobs = self._unstored_images = 0  # on their way into the registry, which cannot count them yet
        self._looked_at = -math.inf
        self._looking: asyncio.Task[None] | None = None
        self._served, self._seconds = 0.0, 0.0  # images, and the time they took, the older the less
        self._last_end: float | None = None

    @property
    def rate(self) -> float | None:
        """Images per second, or None if nothing was measured yet."""
        return self._served / self._seconds if self._seconds > 0 else None

    async def refusal(self) -> float | None:
        """None if there is room; else how many seconds it will take until there is.

        Nobody is refused by an old count; who is let in by one does not wait for a new one, except after a lull: a
        reckoning that is off would take that for time in which jobs were served.
        """
        if self._clock() - self._looked_at > LULL_SECONDS or self._seconds_to_room() > 0:
            self.refresh()
            if self._looking is not None:
                await asyncio.shield(self._looking)
        return self._seconds_to_room() or None

    def refresh(self) -> None:
        """Have an old count made anew, in the background: for those who come next, once who came has been served."""
        if self._clock() - self._looked_at > LOOK_SECONDS:
            self._looking = self._looking or asyncio.create_task(self._look())

    def _seconds_to_room(self) -> float:
        """Zero if there is room."""
        rate = self.rate
        excess = (self._jobs + 1 - self._max_jobs) / max(self._jobs, 1) * self._images
        if rate is not None:
            excess = max(excess, self._images - self._max_seconds * rate)
        if excess <= 0:
            return 0.0
        return UNKNOWN_SECONDS if rate is None else excess / rate

    async def _look(self) -> None:
        try:
            jobs, images = await run_in_threadpool(self._count)
            self._jobs, self._images = jobs + self._unstored_jobs, images + self._unstored_images
            self._looked_at = self._clock()
            if self._jobs == 0:
                self._last_end = None
        except SQLAlchemyError:
            logger.warning("the queue of samples cannot be counted")  # who comes with a request will hear of it
        finally:
            self._looking = None

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """While so many images are on their way into the registry; they count from now on, unless that fails."""
        self._jobs, self._images = self._jobs + 1, self._images + images
        self._unstored_jobs, self._unstored_images = self._unstored_jobs + 1, self._unstored_images + images
        try:
            yield
        except BaseException:
            self._jobs, self._images = self._jobs - 1, self._images - images
            raise
        finally:
            self._unstored_jobs, self._unstored_images = self._unstored_jobs - 1, self._unstored_images - images

    def spared(self, images: int) -> None:
        """What was admitted is there already."""
        self._jobs, self._images = max(0, self._jobs - 1), max(0, self._images - images)

    def ended(self, images: int, jobs: int = 1) -> None:
        """So many images are done, or given up, of jobs that ended together: told one by one, they would seem to have
        been made in no time."""
        now = self._clock()
        if self._last_end is not None and self._jobs > 0:
            seconds = now - self._last_end
            keep = math.exp(-seconds / MEMORY_SECONDS)
            self._served, self._seconds = keep * self._served + images, keep * self._seconds + seconds
        self._jobs, self._images = max(0, self._jobs - jobs), max(0, self._images - images)
        self._last_end = now if self._jobs > 0 else None

    def _count(self) -> tuple[int, int]:
        query = select(func.count(), func.coalesce(func.sum(SampleJob.num_images), 0))
        query = query.where(SampleJob.state == JobState.QUEUED, SampleJob.num_parts == 0)
        with self._registry.read() as session:
            jobs, images = session.execute(query).one()
        return jobs, int(images)


class AdmissionMiddleware:
    """429 for requests for samples while there is no room, before anything of them is read."""

    def __init__(self, app: ASGIApp, admission: Callable[[], Admission], path: str) -> None:
        self.app = app
        self.admission = admission
        self.path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == self.path:
            seconds = await self.admission().refusal()
            if seconds is not None:
                await _too_many(seconds)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _too_many(seconds: float) -> ASGIApp:
    retry_after = max(1, math.ceil(seconds))
    detail = f"too many samples are waiting; accepted: a new try in {retry_after} s, when there will be room"
    return problem_response(TooManyRequestsError.status, detail, headers={"Retry-After": str(retry_after)})
