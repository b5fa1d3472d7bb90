"""Serving a request for samples: its job is stored, and waited for."""

import time
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from service.http.errors import ImagesLostError
from service.registry.samples import Ended
from service.registry.tables import JobState, SampleJob
from service.samples.reading import read_job
from service.samples.state import SamplesState
from service.samples.submitting import Submission
from service.samples.waiting import wait_for_end
from service.state import AppState

T = TypeVar("T")


async def serve(
    state: AppState,
    samples: SamplesState,
    submission: Submission,
    seconds: float | None,
    answer: Callable[[SampleJob, Ended], T],
    request: Request | None = None,
) -> tuple[SampleJob, T | None]:
    """Store a job, wait for its end and answer.

    Args:
        seconds: how long to wait; None does not wait.
        answer: makes the answer from a job that is over, in a thread. If it finds the images lost, their job, which it
            has queued again, is waited for.
        request: if its client hangs up, the job is cancelled.

    Returns:
        The job and the answer; without an answer, the job as it is after so many seconds.

    Raises:
        What `submit_all` gives for the request, and what `answer` raises.
    """
    num_images, owner = submission.request.num_images, submission.caller.owner
    with samples.events.follow(submission.job_id) as events:
        with samples.admission.admit(num_images, owner):
            job = await samples.submissions.add(submission)
        if job.state == JobState.SUCCEEDED or job.id != submission.job_id:
            samples.admission.spared(num_images, owner)
        samples.admission.refresh()
        if seconds is None:
            return job, None
        deadline = time.monotonic() + seconds
        while end := await wait_for_end(state, submission.caller, request, job, events, deadline - time.monotonic()):
            try:
                return job, await run_in_threadpool(answer, job, end)
            except ImagesLostError:
                job = await run_in_threadpool(read_job, state, submission.caller, job.id)
    return await run_in_threadpool(read_job, state, submission.caller, job.id), None
