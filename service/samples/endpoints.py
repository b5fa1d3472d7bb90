"""/v1/samples"""

import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sse_starlette import EventSourceResponse

from service.access.callers import AnyCaller, MaySample
from service.access.idempotency import GivenKey, Once
from service.http.errors import (
    ConflictError,
    DeadlineError,
    ImagesLostError,
    InvalidError,
    JobFailedError,
    NotAcceptableError,
    NotFoundError,
    StoreFullError,
    TooLargeError,
    TooManyRequestsError,
    UnsupportedMediaTypeError,
    error_responses,
)
from service.http.fields import JSON_TYPE, PageParams, PathId, require_json
from service.http.preferences import Prefer, read_preference
from service.registry.samples import Ended
from service.registry.tables import FINAL_STATES, JobState, Model, SampleJob
from service.registry.types import new_id
from service.samples.content import negotiate
from service.samples.reading import artifact_of, cancel_job, end_of, newest, read_images, read_job
from service.samples.schemas import SampleJobOut, SampleJobPage
from service.samples.serving import serve
from service.samples.state import Samples, SamplesState
from service.samples.submitting import Submission
from service.samples.waiting import stream_events
from service.shared import telemetry
from service.shared.fields import Identifier
from service.shared.image_formats import FORMATS
from service.shared.job_requests import SampleRequest
from service.state import WRITES, AppState, State

router = APIRouter(prefix="/v1/samples", tags=["samples"])
Accept = Annotated[str, Header(include_in_schema=False)]

IfNoneMatch = Annotated[str | None, Header(description="ETags of the content that the client has.")]
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
            StoreFullError,
        ),
    },
)
async def sample(
    caller: MaySample,
    body: SampleRequest,
    request: Request,
    state: State,
    samples: Samples,
    accept: Accept = "*/*",
    prefer: Prefer = None,
    idempotency_key: GivenKey = None,
) -> Response:
    """Sample images and wait for them; or, with `Prefer: respond-async`, answer 202 with the job at once.

    A request that was served before, seed and all, gets the same images without sampling. A client that hangs up
    while it waits cancels its job, unless it gave an `Idempotency-Key`: then it may ask again for what came of it.
    """
    respond_async, seconds = read_preference(prefer, state.settings.max_wait_seconds)
    once = Once.of(caller, "sample", idempotency_key, body.model_dump_json())
    waits_for = None if respond_async else accept
    submission = Submission(new_id("smp"), body, waits_for, telemetry.traceparent(), caller, once)

    def answer(job: SampleJob, end: Ended) -> Response:
        return _content(state, samples, job, end, accept, None)

    waiting = request if once is None else None
    job, response = await serve(state, samples, submission, None if respond_async else seconds, answer, waiting)
    return response or _accepted(job)


@router.get("", operation_id="list_sample_jobs", responses=error_responses(InvalidError))
def list_sample_jobs(
    caller: AnyCaller,
    state: State,
    page: PageParams,
    job_state: Annotated[JobState | None, Query(alias="state")] = None,
    model: Annotated[Identifier | None, Query(description="Only jobs of the model with this id.")] = None,
    schedule: Annotated[Identifier | None, Query(description="Only jobs that used the schedule with this id.")] = None,
) -> SampleJobPage:
    """The caller's sampling jobs, of an admin all, newest first, until their samples are deleted."""
    with state.registry.read() as session:
        rows, cursor = newest(session, caller, job_state, model, schedule, page)
        return SampleJobPage(items=[SampleJobOut.model_validate(row) for row in rows], next_cursor=cursor)


@router.get("/{job_id}", operation_id="get_sample_job", responses=error_responses(NotFoundError))
def get_sample_job(caller: AnyCaller, job_id: PathId, state: State) -> SampleJobOut:
    """The state of a sampling job."""
    return SampleJobOut.model_validate(read_job(state, caller, job_id))


@router.post(
    "/{job_id}/cancel",
    operation_id="cancel_sample_job",
    dependencies=[WRITES],
    responses=error_responses(NotFoundError),
)
def cancel_sample_job(caller: MaySample, job_id: PathId, state: State) -> SampleJobOut:
    """Cancel a sampling job; one that is over stays as it is."""
    return SampleJobOut.model_validate(cancel_job(state, caller, job_id))


@router.get(
    "/{job_id}/content",
    operation_id="get_sample_content",
    response_class=Response,
    responses={
        **CONTENT,
        304: {"description": "The client has it already: see If-None-Match."},
        **error_responses(
            NotFoundError, NotAcceptableError, ConflictError, JobFailedError, ImagesLostError, DeadlineError
        ),
    },
)
def get_sample_content(
    caller: AnyCaller,
    job_id: PathId,
    state: State,
    samples: Samples,
    accept: Accept = "*/*",
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The images of a sampling job, in any format, as often as wanted.

    Where the stored images turn out to be damaged, the job is queued again, and 503 says so: the same seed gives the
    same images.
    """
    job = read_job(state, caller, job_id)
    if job.state not in FINAL_STATES:
        raise ConflictError(f"sampling job {job_id!r} is {job.state}; accepted: one that has succeeded")
    return _content(state, samples, job, end_of(job), accept, if_none_match)


@router.get(
    "/{job_id}/events",
    operation_id="follow_sample_job",
    response_class=EventSourceResponse,
    responses={
        200: {"description": "Server-sent events.", "content": {"text/event-stream": {"schema": EVENTS}}},
        **error_responses(NotFoundError),
    },
)
async def follow_sample_job(caller: AnyCaller, job_id: PathId, state: State, samples: Samples) -> EventSourceResponse:
    """The job as it is (`state`), each step from now on (`step`: step, num_steps and, if the request asked for
    previews, a base64 PNG of the images as predicted there), and the job once it is over (`end`)."""
    await run_in_threadpool(read_job, state, caller, job_id)  # A 404 must come before the stream begins.
    return EventSourceResponse(stream_events(state, samples, caller, job_id))


def _accepted(job: SampleJob) -> Response:
    return Response(
        SampleJobOut.model_validate(job).model_dump_json(),
        202,
        headers={"Location": f"/v1/samples/{job.id}"},
        media_type="application/json",
    )


def _content(
    state: AppState, samples: SamplesState, job: SampleJob, end: Ended, accept: str, if_none_match: str | None
) -> Response:
    """The images of a job that is over. Raises: ImagesLostError, and the job is queued again."""
    artifact = artifact_of(job, end)
    media_type = negotiate(accept, _image_shape(state, samples, job.model_id))
    place = f"{artifact}:{end.artifact_row}:{job.num_images}:{media_type}"
    etag = f'"{hashlib.sha256(place.encode()).hexdigest()[:32]}"'
    headers = {
        "Content-Location": f"/v1/samples/{job.id}/content",
        "TimeTuner-Schedule": job.schedule_id or "none",
        "Vary": "Accept",
        "ETag": etag,
    }
    if end.flagged is not None:
        headers["TimeTuner-Flagged"] = ", ".join(map(str, end.flagged)) or "none"
    if if_none_match is not None and (if_none_match.strip() == "*" or etag in if_none_match):
        return Response(status_code=304, headers=headers)
    images = read_images(state, job, end)
    return Response(FORMATS[media_type](images), headers=headers, media_type=media_type)


def _image_shape(state: AppState, samples: SamplesState, model_id: str) -> list[int]:
    """The image shape of a model, which never changes."""
    if model_id not in samples.image_shapes:
        with state.registry.read() as session:
            # The model may have been deleted, and its samples are there still.
            samples.image_shapes[model_id] = session.get_one(Model, model_id).spec["image_shape"]
    return samples.image_shapes[model_id]
