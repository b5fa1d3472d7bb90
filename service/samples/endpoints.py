"""/v1/samples"""

import io
import re
import time
from typing import Annotated, Any

import anyio
import numpy as np
from fastapi import APIRouter, Depends, Header, Response
from fastapi.concurrency import run_in_threadpool

from service.api import AppState, PathId, State, require_json
from service.errors import (
    ConflictError,
    InvalidError,
    JobFailedError,
    NotAcceptableError,
    NotFoundError,
    TooLargeError,
    TooManyRequestsError,
    UnsupportedMediaTypeError,
    error_responses,
)
from service.models.logic import get_model, get_requested_model
from service.queue import publish
from service.registry.tables import FINAL_STATES, JobState, SampleJob
from service.requests import check_room
from service.samples import logic
from service.samples.schemas import SampleJobOut, SampleRequest

router = APIRouter(prefix="/v1/samples", tags=["samples"])

Accept = Annotated[str, Header(include_in_schema=False)]
Prefer = Annotated[
    str | None, Header(description="`respond-async`: answer 202 at once; `wait=N`: wait up to N seconds.")
]
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images, in the format of the Accept header.",
        "content": {
            name: {"schema": {"type": "object"} if name.endswith("json") else {"type": "string", "format": "binary"}}
            for name in logic.FORMATS
        },
    }
}


def _accepted(job: SampleJob) -> Response:
    return Response(
        SampleJobOut.model_validate(job).model_dump_json(),
        202,
        headers={"Location": f"/v1/samples/{job.id}"},
        media_type="application/json",
    )


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
        ),
    },
)
async def sample(body: SampleRequest, state: State, accept: Accept = "*/*", prefer: Prefer = None) -> Response:
    """Sample images and wait for them; or, with `Prefer: respond-async`, answer 202 with the job at once."""
    respond_async, seconds = _preference(prefer, state.settings.max_wait_seconds)
    job = await run_in_threadpool(_submit, state, body, None if respond_async else accept)
    if respond_async:
        return _accepted(job)
    job = await _wait(state, job.id, seconds)
    if job.state not in FINAL_STATES:
        return _accepted(job)
    return await run_in_threadpool(_content, state, job.id, accept)


@router.get("/{job_id}", operation_id="get_sample_job", responses=error_responses(NotFoundError))
def get_sample_job(job_id: PathId, state: State) -> SampleJobOut:
    """The state of a sampling job."""
    with state.registry.read() as session:
        return SampleJobOut.model_validate(logic.get_job(session, job_id))


@router.get(
    "/{job_id}/content",
    operation_id="get_sample_content",
    response_class=Response,
    responses={
        **CONTENT,
        **error_responses(NotFoundError, NotAcceptableError, ConflictError, JobFailedError),
    },
)
def get_sample_content(job_id: PathId, state: State, accept: Accept = "*/*") -> Response:
    """The images of a sampling job, in any format, as often as wanted."""
    return _content(state, job_id, accept)


def _submit(state: AppState, body: SampleRequest, accept: str | None) -> SampleJob:
    """Make and publish the job; if its content is waited for, only when it can be sent as asked."""
    check_room(state.registry, SampleJob, state.settings.max_queued_jobs)
    if accept is not None:
        with state.registry.read() as session:
            model = get_requested_model(session, body.model)
        logic.negotiate(accept, model.spec["image_shape"])
    job = logic.submit(state.registry, state.settings, body)
    publish(state.celery, state.registry, SampleJob, [job.id])
    return job


async def _wait(state: AppState, job_id: str, seconds: float) -> SampleJob:
    """The job once it is over, or as it is after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = 0.005
    while True:
        job = await run_in_threadpool(_read, state, job_id)
        if job.state in FINAL_STATES or time.monotonic() > deadline:
            return job
        await anyio.sleep(pause)
        pause = min(2 * pause, 0.1)


def _read(state: AppState, job_id: str) -> SampleJob:
    with state.registry.read() as session:
        return logic.get_job(session, job_id)


def _content(state: AppState, job_id: str, accept: str) -> Response:
    with state.registry.read() as session:
        job = logic.get_job(session, job_id)
        shape = get_model(session, job.model_id).spec["image_shape"]
    media_type = logic.negotiate(accept, shape)
    if job.state in (JobState.QUEUED, JobState.RUNNING):
        raise ConflictError(f"sampling job {job_id!r} is {job.state}; accepted: one that has succeeded")
    if job.state != JobState.SUCCEEDED or job.artifact is None:
        raise JobFailedError(f"sampling job {job_id!r} has {job.state}: {job.error}")
    images = np.load(io.BytesIO(state.artifacts.get(job.artifact)), allow_pickle=False)
    headers = {
        "Content-Location": f"/v1/samples/{job_id}/content",
        "TimeTuner-Schedule": job.schedule_id or "none",
        "Vary": "Accept",
    }
    return Response(logic.FORMATS[media_type](images), headers=headers, media_type=media_type)


def _preference(prefer: str | None, longest: float) -> tuple[bool, float]:
    """Whether to answer at once, and else how long to wait (RFC 7240)."""
    prefer = prefer or ""
    wait = re.search(r"\bwait\s*=\s*(\d{1,6})\b", prefer)
    return "respond-async" in prefer and wait is None, min(float(wait[1]), longest) if wait else longest
