"""Waiting for a job's end, its images or its events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from sse_starlette import ServerSentEvent

from service.access.callers import Caller
from service.registry.samples import Ended
from service.registry.tables import FINAL_STATES, SampleJob
from service.samples.reading import cancel_job, end_of, read_followed, read_job
from service.samples.schemas import SampleJobOut
from service.samples.state import SamplesState
from service.state import AppState

READ_SECONDS = 1.0  # The registry is read this often, in case an event was lost.


async def wait_for_end(
    state: AppState,
    caller: Caller,
    request: Request | None,
    job: SampleJob,
    events: "asyncio.Queue[Any]",
    seconds: float,
) -> Ended | None:
    """How a job ends, or None if that takes more than `seconds`. Cancels it if the client of `request` hangs up."""
    if job.state in FINAL_STATES:
        return end_of(job)
    hung_up = asyncio.create_task(_hung_up(request))
    deadline = time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0:
            received = asyncio.create_task(events.get())
            timeout = min(left, READ_SECONDS)
            await asyncio.wait({received, hung_up}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if received.done():
                if isinstance(received.result(), Ended):
                    return received.result()  # type: ignore[no-any-return]
                continue
            received.cancel()
            if hung_up.done():
                await state.run_write(cancel_job, state, caller, job.id)
                return None
            current = await run_in_threadpool(read_job, state, caller, job.id)
            if current.state in FINAL_STATES:
                return end_of(current)
        return None
    finally:
        hung_up.cancel()


async def _hung_up(request: Request | None) -> None:
    """Return when the client of the request disconnects. Without a request, never return."""
    if request is None:
        await asyncio.Event().wait()
        return
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream_events(
    state: AppState, samples: SamplesState, caller: Caller, job_id: str
) -> AsyncIterator[ServerSentEvent]:
    with samples.events.follow(job_id) as events:
        job = await run_in_threadpool(read_job, state, caller, job_id)
        yield ServerSentEvent(SampleJobOut.model_validate(job).model_dump_json(), event="state")
        read_at = time.monotonic()
        while job.state not in FINAL_STATES:
            try:
                received = await asyncio.wait_for(events.get(), READ_SECONDS)
            except TimeoutError:
                received = None
            if isinstance(received, dict):
                yield ServerSentEvent(json.dumps(received), event="step")
            if not isinstance(received, dict) or time.monotonic() - read_at > READ_SECONDS:
                current = await run_in_threadpool(read_followed, state, caller, job_id)
                if current is None:
                    return
                job, read_at = current, time.monotonic()
        yield ServerSentEvent(SampleJobOut.model_validate(job).model_dump_json(), event="end")
