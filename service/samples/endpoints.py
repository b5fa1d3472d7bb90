"""/v1/samples"""

import asyncio
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from sse_starlette import EventSourceResponse, ServerSentEvent

from service import telemetry
from service.access.callers import Caller
from service.access.needs import AnyCaller, needs
from service.api import JSON_TYPE, PathId, require_json
from service.errors import (
    ConflictError,
    DeadlineError,
    InvalidError,
    JobFailedError,
    NotAcceptableError,
    NotFoundError,
    TooLargeError,
    TooManyRequestsError,
    UnsupportedMediaTypeError,
    error_responses,
)
from service.idempotency import GivenKey, Once
from service.models.logic import get_model
from service.registry.jobs import request_cancel
from service.registry.keys import Scope
from service.registry.samples import LATE, Ended, ended
from service.registry.tables import FINAL_STATES, JobState, SampleJob
from service.registry.types import new_id
from service.samples import logic
from service.samples.formats import FORMATS
from service.samples.schemas import SampleJobOut, SampleRequest
from service.state import AppState, State

router = APIRouter(prefix="/v1/samples", tags=["samples"])

Sampler = Annotated[Caller, needs(Scope.SAMPLE)]
Accept = Annotated[str, Header(include_in_schema=False)]
Prefer = Annotated[
    str | None, Header(description="`respond-async`: answer 202 at once; `wait=N`: wait up to N seconds.")
]
IfNoneMatch = Annotated[str | None, Header(description="ETags of the content that the client has.")]
LOOK_SECONDS = 1.0  # between looks into the registry, should a worker's news get lost
AS_JSON = {"type": "object", "examples": [{"images": ["iVBORw0KGgo="]}]}
EVENTS = {"type": "string", "examples": ['event: step\ndata: {"step": 1, "num_steps": 10}\n\n']}
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images, in the format of the Accept header.",
        "content": {
            name: {"schema": AS_JSON if name == JSON_TYPE else {"type": "string", "format": "binary"}}
            for name in FORMATS
        },
    }
}


@router.post(
    "",
    operation_id="sample",
    dependencies=[Depends(require_json)],
    response_class=Response,
    responses={
        **CONTENT,
        202: {"model": SampleJobOut, "description": "Accepted; follow its `Location`."},
        **error_responses(
            NotAcceptableError,
            TooLargeError,
            UnsupportedMediaTypeError,
            InvalidError,
            TooManyRequestsError,
            JobFailedError,
            DeadlineError,
        ),
    },
)
async def sample(
    caller: Sampler,
    body: SampleRequest,
    request: Request,
    state: State,
    accept: Accept = "*/*",
    prefer: Prefer = None,
    idempotency_key: GivenKey = None,
) -> Response:
    """Sample images and wait for them; or, with `Prefer: respond-async`, answer 202 with the job at once.

    A request that was served before, seed and all, gets the same images without sampling. A client that hangs up
    while it waits cancels its job, unless it gave an `Idempotency-Key`: then it may ask again for what came of it.
    """
    respond_async, seconds = _preference(prefer, state.settings.max_wait_seconds)
    job_id = new_id("smp")
    with state.news.follow(job_id) as news:
        once = Once.of(caller, "sample", idempotency_key, body.model_dump_json())
        waits_for = None if respond_async else accept
        submission = logic.Submission(job_id, body, waits_for, telemetry.traceparent(), caller, once)
        with state.admission.admit(body.num_images):
            job = await state.submissions.add(submission)
        if job.state == JobState.SUCCEEDED or job.id != job_id:
            state.admission.spared(body.num_images)
        state.admission.refresh()
        if respond_async:
            return _accepted(job)
        end = await _end(state, caller, request if once is None else None, job, news, seconds)
    if end is None:
        return _accepted(await run_in_threadpool(_read, state, caller, job.id))
    return await run_in_threadpool(_content, state, job, end, accept, None)


@router.get("/{job_id}", operation_id="get_sample_job", responses=error_responses(NotFoundError))
def get_sample_job(caller: AnyCaller, job_id: PathId, state: State) -> SampleJobOut:
    """The state of a sampling job."""
    return SampleJobOut.model_validate(_read(state, caller, job_id))


@router.post("/{job_id}/cancel", operation_id="cancel_sample_job", responses=error_responses(NotFoundError))
def cancel_sample_job(caller: Sampler, job_id: PathId, state: State) -> SampleJobOut:
    """Cancel a sampling job; one that is over stays as it is."""
    return SampleJobOut.model_validate(_cancel(state, caller, job_id))


@router.get(
    "/{job_id}/content",
    operation_id="get_sample_content",
    response_class=Response,
    responses={
        **CONTENT,
        304: {"description": "The client has it already: see If-None-Match."},
        **error_responses(NotFoundError, NotAcceptableError, ConflictError, JobFailedError, DeadlineError),
    },
)
def get_sample_content(
    caller: AnyCaller, job_id: PathId, state: State, accept: Accept = "*/*", if_none_match: IfNoneMatch = None
) -> Response:
    """The images of a sampling job, in any format, as often as wanted."""
    job = _read(state, caller, job_id)
    if job.state not in FINAL_STATES:
        raise ConflictError(f"sampling job {job_id!r} is {job.state}; accepted: one that has succeeded")
    return _content(state, job, _end_of(job), accept, if_none_match)


@router.get(
    "/{job_id}/events",
    operation_id="follow_sample_job",
    response_class=EventSourceResponse,
    responses={
        200: {"description": "Server-sent events.", "content": {"text/event-stream": {"schema": EVENTS}}},
        **error_responses(NotFoundError),
    },
)
async def follow_sample_job(caller: AnyCaller, job_id: PathId, state: State) -> EventSourceResponse:
    """The job as it is (`state`), each step from now on (`step`: step, num_steps and, if the request asked for
    previews, a base64 PNG of the images as predicted there), and the job once it is over (`end`)."""
    await run_in_threadpool(_read, state, caller, job_id)  # 404 before the stream begins
    return EventSourceResponse(_stream(state, caller, job_id))


def _accepted(job: SampleJob) -> Response:
    return Response(
        SampleJobOut.model_validate(job).model_dump_json(),
        202,
        headers={"Location": f"/v1/samples/{job.id}"},
        media_type="application/json",
    )


async def _end(
    state: AppState, caller: Caller, request: Request | None, job: SampleJob, news: "asyncio.Queue[Any]", seconds: float
) -> Ended | None:
    """How a job ends, or None if that takes more than `seconds`. Cancels it if the client of `request` hangs up."""
    if job.state in FINAL_STATES:
        return _end_of(job)
    hung_up = asyncio.create_task(_hung_up(request))
    deadline = time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0:
            told = asyncio.create_task(news.get())
            await asyncio.wait({told, hung_up}, timeout=min(left, LOOK_SECONDS), return_when=asyncio.FIRST_COMPLETED)
            if told.done():
                if isinstance(told.result(), Ended):
                    return told.result()  # type: ignore[no-any-return]
                continue
            told.cancel()
            if hung_up.done():
                await run_in_threadpool(_cancel, state, caller, job.id)
                return None
            current = await run_in_threadpool(_read, state, caller, job.id)
            if current.state in FINAL_STATES:
                return _end_of(current)
        return None
    finally:
        hung_up.cancel()


async def _hung_up(request: Request | None) -> None:
    """Until the client does; without a request, for ever."""
    if request is None:
        await asyncio.Event().wait()
        return
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _end_of(job: SampleJob) -> Ended:
    return ended(job, job.state, job.artifact, job.artifact_row, job.error)


def _read(state: AppState, caller: Caller, job_id: str) -> SampleJob:
    with state.registry.read() as session:
        return logic.get_job(session, caller, job_id)


def _cancel(state: AppState, caller: Caller, job_id: str) -> SampleJob:
    with state.registry.write() as session:
        job = logic.get_job(session, caller, job_id, with_for_update=True)
        request_cancel(session, job)
        caller.record(session, "cancel_sample_job", job_id)
    state.bus.tell_ended([_end_of(job)] if job.state in FINAL_STATES else [])
    return job


def _content(state: AppState, job: SampleJob, end: Ended, accept: str, if_none_match: str | None) -> Response:
    """The images of a job that is over."""
    if end.state != JobState.SUCCEEDED or end.artifact is None:
        detail = f"sampling job {job.id!r} has {end.state}: {end.error}"
        raise DeadlineError(detail) if end.error == LATE else JobFailedError(detail)
    media_type = logic.negotiate(accept, _image_shape(state, job.model_id))
    place = f"{end.artifact}:{end.artifact_row}:{job.num_images}:{media_type}"
    etag = f'"{hashlib.sha256(place.encode()).hexdigest()[:32]}"'
    headers = {
        "Content-Location": f"/v1/samples/{job.id}/content",
        "TimeTuner-Schedule": job.schedule_id or "none",
        "Vary": "Accept",
        "ETag": etag,
    }
    if if_none_match is not None and (if_none_match.strip() == "*" or etag in if_none_match):
        return Response(status_code=304, headers=headers)
    images = state.artifacts.get_rows(end.artifact, end.artifact_row, job.num_images)
    return Response(FORMATS[media_type](images), headers=headers, media_type=media_type)


def _image_shape(state: AppState, model_id: str) -> list[int]:
    """Of a model, which never changes."""
    if model_id not in state.image_shapes:
        with state.registry.read() as session:
            state.image_shapes[model_id] = get_model(session, model_id).spec["image_shape"]
    return state.image_shapes[model_id]


async def _stream(state: AppState, caller: Caller, job_id: str) -> AsyncIterator[ServerSentEvent]:
    with state.news.follow(job_id) as news:
        job = await run_in_threadpool(_read, state, caller, job_id)
        yield ServerSentEvent(SampleJobOut.model_validate(job).model_dump_json(), event="state")
        while job.state not in FINAL_STATES:
            try:
                told = await asyncio.wait_for(news.get(), LOOK_SECONDS)
            except TimeoutError:
                told = None
            if isinstance(told, dict):
                yield ServerSentEvent(json.dumps(told), event="step")
            else:
                job = await run_in_threadpool(_read, state, caller, job_id)
        yield ServerSentEvent(SampleJobOut.model_validate(job).model_dump_json(), event="end")


def _preference(prefer: str | None, longest: float) -> tuple[bool, float]:
    """Whether to answer at once, and else how long to wait (RFC 7240)."""
    prefer = prefer or ""
    wait = re.search(r"\bwait\s*=\s*(\d{1,6})\b", prefer)
    return "respond-async" in prefer and wait is None, min(float(wait[1]), longest) if wait else longest
