"""Reading a caller's sampling jobs."""

from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.http.errors import NotFoundError
from service.registry.jobs import request_cancel
from service.registry.samples import Ended, ended
from service.registry.tables import FINAL_STATES, SampleJob
from service.state import AppState


def get_job(session: Session, caller: Caller, job_id: str, with_for_update: bool = False) -> SampleJob:
    """A job of the caller's. Raises: NotFoundError."""
    job = session.get(SampleJob, job_id, with_for_update=with_for_update)
    if job is None or job.parent_id is not None or not caller.sees(job):
        raise NotFoundError(
            f"no sampling job {job_id!r}; accepted: an id that POST /v1/samples gave, until its samples are deleted"
        )
    return job


def end_of(job: SampleJob) -> Ended:
    return ended(job, job.state, job.artifact, job.artifact_row, job.error)


def read_job(state: AppState, caller: Caller, job_id: str) -> SampleJob:
    with state.registry.read() as session:
        return get_job(session, caller, job_id)


def read_followed(state: AppState, caller: Caller, job_id: str) -> SampleJob | None:
    """A job of the caller's that is followed for long; None once the caller's key is revoked or has expired."""
    with state.registry.read() as session:
        return get_job(session, caller, job_id) if caller.is_still_valid(session) else None


def cancel_job(state: AppState, caller: Caller, job_id: str) -> SampleJob:
    with state.registry.write() as session:
        job = get_job(session, caller, job_id, with_for_update=True)
        request_cancel(session, job)
        caller.record(session, "cancel_sample_job", job_id)
    state.bus.publish_ends([end_of(job)] if job.state in FINAL_STATES else [])
    return job
