"""Batched writes of sampling requests: all that come while one transaction runs share the next."""

import asyncio
from collections.abc import Callable, Sequence

from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import IntegrityError

from service.http.errors import ServiceError
from service.registry.tables import JobState, SampleJob
from service.samples.submitting import Submission


class Submissions:
    """Calls `submit_all` with groups of requests, and then `announce`, once for each group."""

    def __init__(
        self, submit_all: Callable[[Sequence[Submission]], list[SampleJob | ServiceError]], announce: Callable[[], None]
    ) -> None:
        self._submit_all = submit_all
        self._announce = announce
        self._waiting: list[tuple[Submission, asyncio.Future[SampleJob]]] = []
        self._task: asyncio.Task[None] | None = None

    async def add(self, submission: Submission) -> SampleJob:
        """The job, stored. Raises what `submit_all` gives for it."""
        future: asyncio.Future[SampleJob] = asyncio.get_running_loop().create_future()
        self._waiting.append((submission, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._submit())
        return await future

    async def _submit(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            outcomes = await run_in_threadpool(self._outcomes, [submission for submission, _ in group])
            for (_, future), outcome in zip(group, outcomes, strict=True):
                if future.done():
                    continue  # The request was cancelled.
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    def _outcomes(self, submissions: list[Submission]) -> list[SampleJob | Exception]:
        """The outcomes of a group. If the database refuses it, each request is tried alone, so that one fails alone."""
        try:
            outcomes = self._submit_all(submissions)
            if any(isinstance(outcome, SampleJob) and outcome.state == JobState.QUEUED for outcome in outcomes):
                self._announce()
            return [*outcomes]
        except IntegrityError as error:
            if len(submissions) == 1:
                return [error]
            return [outcome for submission in submissions for outcome in self._outcomes([submission])]
        except Exception as error:  # While the database is away, each request of the group fails with this error.
            return [error] * len(submissions)
