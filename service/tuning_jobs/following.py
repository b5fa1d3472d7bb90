"""Streams of tuning jobs: one look at the registry tells all of a process whether there is something to read."""

import asyncio
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.registry.database import Registry
from service.registry.keys import valid_keys
from service.registry.tables import FINAL_STATES, JobState, TuningJob, TuningJobEvent

LOOK_SECONDS = 0.25

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Follower:
    """A stream.

    Attributes:
        last_id: the id of the last event that the stream has sent.
        has_news: set while there is something to read: later events, the job's end, or that the key is not valid.
    """

    job_id: str
    caller: Caller
    last_id: int
    has_news: asyncio.Event = field(default_factory=asyncio.Event)


class TuningEvents:
    """The streams that one API process serves, and the task that looks for them while there are any."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._followers: set[Follower] = set()
        self._looking: asyncio.Task[None] | None = None

    @contextmanager
    def follow(self, job_id: str, caller: Caller, last_id: int) -> Iterator[Follower]:
        """A follower of a job from now on. The caller keeps its `last_id` up to date, and clears `has_news`."""
        follower = Follower(job_id, caller, last_id)
        self._followers.add(follower)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_until_nobody_follows())
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    async def _look_until_nobody_follows(self) -> None:
        while self._followers:
            followers = list(self._followers)
            try:
                for follower in await run_in_threadpool(self._with_news, followers):
                    follower.has_news.set()
            except SQLAlchemyError:
                logger.warning("the database cannot be read; streams of tuning jobs wait for it")
            await asyncio.sleep(LOOK_SECONDS)

    def _with_news(self, followers: list[Follower]) -> list[Follower]:
        """The followers that have something to read."""
        key_ids = {follower.caller.owner for follower in followers if follower.caller.owner is not None}
        with self._registry.read() as session:
            newest = _newest_events(session, {follower.job_id for follower in followers})
            valid = valid_keys(session, key_ids) if key_ids else set()

        def has_news(follower: Follower) -> bool:
            is_invalid = follower.caller.owner in key_ids - valid
            if is_invalid or follower.job_id not in newest:
                return True
            state, event_id = newest[follower.job_id]
            return state in FINAL_STATES or event_id > follower.last_id

        return [follower for follower in followers if has_news(follower)]


def _newest_events(session: Session, job_ids: Collection[str]) -> dict[str, tuple[JobState, int]]:
    """The state of jobs, and the id of their newest event. Each job takes one step into two indexes."""
    newest = select(func.max(TuningJobEvent.id)).where(TuningJobEvent.job_id == TuningJob.id).scalar_subquery()
    rows = session.execute(select(TuningJob.id, TuningJob.state, newest).where(TuningJob.id.in_(job_ids)))
    return {job_id: (state, event_id or 0) for job_id, state, event_id in rows}


async def _tuning_events(request: Request) -> TuningEvents:
    events: TuningEvents = request.app.state.tuning_events
    return events


Events = Annotated[TuningEvents, Depends(_tuning_events)]
