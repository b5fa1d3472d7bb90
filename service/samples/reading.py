"""Reading a caller's sampling jobs."""

import logging
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.access.visibility import is_seen_job
from service.http.errors import DeadlineError, ImagesLostError, JobFailedError, NotFoundError
from service.http.fields import PageQuery, newest_first
from service.registry.jobs import request_cancel
from service.registry.samples import LATE, Ended, ended, sample_again
from service.registry.tables import FINAL_STATES, JobState, SampleJob
from service.shared.artifacts import DamagedArtifactError
from service.shared.image_formats import Images
from service.state import AppState

logger = logging.getLogger(__name__)


def get_job(session: Session, caller: Caller, job_id: str, with_for_update: bool = False) -> SampleJob:
    """A job of the caller's. Raises: NotFoundError."""
    job = session.get(SampleJob, job_id, with_for_update=with_for_update)
    if job is None or job.parent_id is not None or not caller.sees(job):
        raise NotFoundError(
            f"no sampling job {job_id!r}; accepted: an id that POST /v1/samples gave, until its samples are deleted"
        )
    return job


def newest(
    session: Session,
    caller: Caller,
    state: JobState | None,
    model_id: str | None,
    schedule_id: str | None,
    page: PageQuery,
) -> tuple[Sequence[SampleJob], str | None]:
    """One page of the jobs the caller sees, newest first, and the cursor of the next. Parts of jobs are left out."""
    query = select(SampleJob).where(SampleJob.parent_id.is_(None), is_seen_job(caller, SampleJob))
    if state is not None:
        query = query.where(SampleJob.state == state)
    if model_id is not None:
        query = query.where(SampleJob.model_id == model_id)
    if schedule_id is not None:
        query = query.where(SampleJob.schedule_id == schedule_id)
    return newest_first(session, query, SampleJob.id, page)


def end_of(job: SampleJob) -> Ended:
    return ended(job, job.state, job.artifact, job.artifact_row, job.error, job.flagged)


def read_job(state: AppState, caller: Caller, job_id: str) -> SampleJob:
    with state.registry.read() as session:
        return get_job(session, caller, job_id)


def read_followed(state: AppState, caller: Caller, job_id: str) -> SampleJob | None:
    """A job of the caller's that is followed for long; None once the caller's key is revoked or has expired."""
    with state.registry.read() as session:
        return get_job(session, caller, job_id) if caller.is_still_valid(session) else None


def artifact_of(job: SampleJob, end: Ended) -> str:
    """The key of the images of a job that is over. Raises: JobFailedError, DeadlineError, if there are none."""
    if end.state != JobState.SUCCEEDED or end.artifact is None:
        detail = f"sampling job {job.id!r} has {end.state}: {end.error}"
        raise DeadlineError(detail) if end.error == LATE else JobFailedError(detail)
    return end.artifact


def read_images(state: AppState, job: SampleJob, end: Ended) -> Images:
    """The images of a job that is over.

    Raises:
        JobFailedError, DeadlineError: it has none.
        ImagesLostError: they are damaged, and the job is queued again.
    """
    artifact = artifact_of(job, end)
    try:
        return state.artifacts.get_rows(artifact, end.artifact_row, job.num_images)
    except DamagedArtifactError as error:
        logger.warning("the images of %s are sampled again: %s", job.id, error)
        with state.registry.write() as session:
            sample_again(session, job.id, artifact)
        state.bus.announce_samples()
        detail = f"the images of sampling job {job.id!r} were damaged, and are sampled again"
        raise ImagesLostError(f"{detail}; accepted: the same request, once it has succeeded") from error


def cancel_job(state: AppState, caller: Caller, job_id: str) -> SampleJob:
    with state.registry.write() as session:
        job = get_job(session, caller, job_id, with_for_update=True)
        request_cancel(session, job)
        caller.record(session, "cancel_sample_job", job_id)
    state.bus.publish_ends([end_of(job)] if job.state in FINAL_STATES else [])
    return job
