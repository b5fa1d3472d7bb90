"""/v1/tuning-jobs"""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from sse_starlette import EventSourceResponse, ServerSentEvent

from service.access.callers import AnyCaller, Caller, MayTune
from service.access.idempotency import GivenKey
from service.http.errors import (
    ConflictError,
    InvalidError,
    NotFoundError,
    TooLargeError,
    TooManyRequestsError,
    UnsupportedMediaTypeError,
    error_responses,
)
from service.http.fields import JSON_TYPE, PageParams, PathId, require_json
from service.registry.tables import FINAL_STATES, JobState, TuningJob
from service.shared.job_requests import TuningJobRequest
from service.shared.queue import publish
from service.state import WRITES, AppState, State
from service.tuning_jobs import logic
from service.tuning_jobs.following import Events, TuningEvents
from service.tuning_jobs.schemas import (
    EventOut,
    EventPage,
    TuningJobDetail,
    TuningJobOut,
    TuningJobPage,
    TuningJobProgress,
)

router = APIRouter(prefix="/v1/tuning-jobs", tags=["tuning jobs"])

SSE_TYPE = "text/event-stream"
EVENTS = {"type": "string", "examples": ['id: 3\nevent: progress\ndata: {"id": 3, "type": "progress"}\n\n']}
MAX_EVENT_ID = 2**63 - 1  # The column is a 64-bit integer.


@router.post(
    "",
    status_code=202,
    operation_id="submit_tuning_job",
    dependencies=[Depends(require_json), WRITES],
    responses=error_responses(
        ConflictError, TooLargeError, UnsupportedMediaTypeError, InvalidError, TooManyRequestsError
    ),
)
def submit_tuning_job(
    caller: MayTune, body: TuningJobRequest, state: State, response: Response, idempotency_key: GivenKey = None
) -> TuningJobOut:
    """Queue a tuning job; follow it at its `Location`."""
    job, created = logic.submit(state.registry, state.settings, caller, body, idempotency_key)
    if created:
        publish(state.celery, state.registry, TuningJob, [job.id])
    response.headers["Location"] = f"/v1/tuning-jobs/{job.id}"
    return TuningJobOut.model_validate(job)


@router.get("", operation_id="list_tuning_jobs", responses=error_responses(InvalidError))
def list_tuning_jobs(
    caller: AnyCaller,
    state: State,
    page: PageParams,
    job_state: Annotated[JobState | None, Query(alias="state")] = None,
) -> TuningJobPage:
    """The caller's tuning jobs, of an admin all, newest first."""
    with state.registry.read() as session:
        rows, cursor = logic.newest(session, caller, job_state, page)
        return TuningJobPage(items=[TuningJobOut.model_validate(row) for row in rows], next_cursor=cursor)


@router.get("/{job_id}", operation_id="get_tuning_job", responses=error_responses(NotFoundError))
def get_tuning_job(caller: AnyCaller, job_id: PathId, state: State) -> TuningJobDetail:
    """One tuning job, with its phases and the state of each step."""
    with state.registry.read() as session:
        job = logic.get_job(session, caller, job_id)
        detail = TuningJobDetail.model_validate(job)
        progress = TuningJobProgress.model_validate(logic.progress_of(session, job))
        return detail.model_copy(update={name: getattr(progress, name) for name in TuningJobProgress.model_fields})


@router.post(
    "/{job_id}/cancel",
    operation_id="cancel_tuning_job",
    dependencies=[WRITES],
    responses=error_responses(NotFoundError, ConflictError),
)
def cancel_tuning_job(caller: MayTune, job_id: PathId, state: State) -> TuningJobOut:
    """Cancel: a queued job at once, a running one as soon as its worker sees it."""
    return TuningJobOut.model_validate(logic.cancel(state.registry, caller, job_id))


@router.get(
    "/{job_id}/events",
    operation_id="list_tuning_job_events",
    response_model=EventPage,
    responses={
        200: {"content": {SSE_TYPE: {"schema": EVENTS}}, "description": "The events, or a stream."},
        **error_responses(NotFoundError),
    },
)
async def list_tuning_job_events(
    caller: AnyCaller,
    job_id: PathId,
    state: State,
    tuning_events: Events,
    accept: Annotated[str, Header(include_in_schema=False)] = JSON_TYPE,
    after: Annotated[int, Query(ge=0, le=MAX_EVENT_ID, description="Only events with a greater id.")] = 0,
    last_event_id: Annotated[str | None, Header(description="The same as `after`. SSE clients send it.")] = None,
) -> Response:
    """A job's events so far as JSON; or, with `Accept: text/event-stream`, also those to come until it ends."""
    if last_event_id is not None and last_event_id.isdecimal():
        after = min(int(last_event_id[:20]), MAX_EVENT_ID)
    if SSE_TYPE in accept:
        await run_in_threadpool(_read_events, state, caller, job_id, after)  # A 404 must come before the stream begins.
        return EventSourceResponse(_stream(state, tuning_events, caller, job_id, after))
    events, _ = await run_in_threadpool(_read_events, state, caller, job_id, after)
    return Response(EventPage(items=events).model_dump_json(), media_type=JSON_TYPE)


def _read_events(state: AppState, caller: Caller, job_id: str, after: int) -> tuple[list[EventOut], bool]:
    """The events after an id, and whether they are the last. One whose key was revoked gets no more."""
    with state.registry.read() as session:
        if not caller.is_still_valid(session):
            return [], True
        over = logic.get_job(session, caller, job_id).state in FINAL_STATES
        events = [EventOut.model_validate(event) for event in logic.events_after(session, job_id, after)]
    return events, over and len(events) < 1000


async def _stream(
    state: AppState, tuning_events: TuningEvents, caller: Caller, job_id: str, after: int
) -> AsyncIterator[ServerSentEvent]:
    with tuning_events.follow(job_id, caller, after) as follower:
        while True:
            # The flag is cleared before reading: an event that comes meanwhile sets it again.
            follower.has_news.clear()
            events, over = await run_in_threadpool(_read_events, state, caller, job_id, follower.last_id)
            for event in events:
                yield ServerSentEvent(event.model_dump_json(), event=event.type, id=str(event.id))
                follower.last_id = event.id
            if over:
                return
            await follower.has_news.wait()
