"""The life of a job of any kind: submitted, published, claimed under a lease, finished or taken back.

The registry is the truth and the broker only a notification: the worker that claims a job here runs it, so a message
that is lost, late or doubled does no harm. The database's clock decides when a lease has expired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Float, Select, bindparam, case, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from service.registry.tables import (
    FINAL_STATES,
    Job,
    JobState,
    ModelRegistration,
    SampleJob,
    TuningJob,
    TuningJobEvent,
    TuningTask,
)
from service.registry.types import FromNow, utc_now
from service.registry.usage import charge_tuning_job

JOB_CLASSES: tuple[type[Job], ...] = (TuningJob, TuningTask, SampleJob, ModelRegistration)
PUBLISHED_CLASSES: tuple[type[Job], ...] = (TuningJob, TuningTask)  # Each of these jobs has its own message.


class LeaseLostError(Exception):
    """Another worker has the job now, or it is over: nothing more may be written for it."""


@dataclass(frozen=True)
class Claim:
    """The right to run a job, as long as its fencing token is the newest."""

    job_class: type[Job]
    job_id: str
    fencing_token: int
    request_id: str | None  # The id of the HTTP request that made the job.


def add_event(session: Session, job: Job, type: str, **data: Any) -> None:
    """Record an event of a tuning job. Other kinds of jobs have no events."""
    if isinstance(job, TuningJob):
        session.add(TuningJobEvent(job_id=job.id, type=type, data=data))


def claim(session: Session, job_class: type[Job], job_id: str, owner: str, lease_seconds: float) -> Claim | None:
    """Take a queued job, or one whose worker let the lease run out; None if there is nothing to take."""
    token = session.scalar(
        update(job_class)
        .where(job_class.id == job_id, is_free(job_class))
        .values(claimed_by(job_class, owner, lease_seconds, utc_now()))
        .returning(job_class.fencing_token)
    )
    if token is None:
        return None
    job = session.get_one(job_class, job_id)
    add_event(session, job, "started", attempt=job.attempt, worker=owner)
    return Claim(job_class, job_id, token, job.request_id)


def claimed_by(job_class: type[Job], owner: Any, lease_seconds: Any, now: Any) -> dict[str, Any]:
    """The columns that claiming a job sets. The arguments are values, or bind parameters that stand for them."""
    return {
        "state": JobState.RUNNING,
        "attempt": job_class.attempt + 1,
        "losses": job_class.losses + case((job_class.state == JobState.RUNNING, 1), else_=0),
        "fencing_token": job_class.fencing_token + 1,
        "lease_owner": owner,
        "lease_expires_at": FromNow(lease_seconds),
        "started_at": func.coalesce(job_class.started_at, now),
    }


def is_free(job_class: type[Job]) -> ColumnElement[bool]:
    """Whether `claim` would take a job."""
    return or_(job_class.state == JobState.QUEUED, _is_expired(job_class))


def _is_expired(job_class: type[Job]) -> ColumnElement[bool]:
    return (job_class.state == JobState.RUNNING) & (job_class.lease_expires_at < FromNow())


def renew(session: Session, claim: Claim, lease_seconds: float) -> Job:
    """Extend the lease and lock the job's row until the transaction ends.

    Raises:
        LeaseLostError: the claim is no longer the newest, or the job is over.
    """
    job = session.get_one(claim.job_class, claim.job_id, with_for_update=True, populate_existing=True)
    if job.fencing_token != claim.fencing_token or job.state != JobState.RUNNING:
        raise LeaseLostError(claim.job_id)
    job.lease_expires_at = FromNow(lease_seconds)
    return job


def finish(session: Session, job: Job, state: JobState, error: str | None = None) -> None:
    """Enter a final state. Tasks or parts of the job that are not over are cancelled with it.

    What a tuning job used is added to the total of its key.
    """
    job.state = state
    job.error = error[:2000] if error else None
    job.finished_at = utc_now()
    job.lease_owner = job.lease_expires_at = None
    if state == JobState.SUCCEEDED:
        job.progress = 1.0
    add_event(session, job, str(state), **({"error": job.error} if job.error else {}))
    _cancel_children(session, job)
    if isinstance(job, TuningJob):
        charge_tuning_job(session, job)


def request_cancel(session: Session, job: Job) -> None:
    """Cancel a queued job at once. A running job's worker sees the request when it renews its lease.

    The job's tasks or parts are cancelled with it.
    """
    if job.state in FINAL_STATES:
        return
    if job.state == JobState.QUEUED or (isinstance(job, SampleJob) and job.num_parts):
        finish(session, job, JobState.CANCELLED)
    elif not job.cancel_requested:
        job.cancel_requested = True
        add_event(session, job, "cancel_requested")
        _cancel_children(session, job)


def _cancel_children(session: Session, job: Job) -> None:
    """Cancel a job's tasks or parts. All code locks the job first and its children by id, which prevents deadlocks."""
    children: Select[TuningTask] | Select[SampleJob]
    if isinstance(job, TuningJob):
        children = select(TuningTask).where(TuningTask.job_id == job.id, TuningTask.state.not_in(FINAL_STATES))
        children = children.order_by(TuningTask.id)
    elif isinstance(job, SampleJob) and job.num_parts:
        children = select(SampleJob).where(SampleJob.parent_id == job.id, SampleJob.state.not_in(FINAL_STATES))
        children = children.order_by(SampleJob.id)
    else:
        return
    locked = children.with_for_update()
    for child in session.scalars(locked, execution_options={"populate_existing": True}):
        request_cancel(session, child)


def hand_back(session: Session, job: Job) -> None:
    """Queue a job again that its worker cannot run to its end. The attempt does not count."""
    job.attempt -= 1
    if job.cancel_requested:
        finish(session, job, JobState.CANCELLED)
    else:
        _requeue(session, job)


def unpublish(session: Session, job_class: type[Job], job_id: str) -> None:
    """Have a queued job published again, because the worker that got its message will not run it."""
    queued = job_class.state == JobState.QUEUED
    session.execute(update(job_class).where(job_class.id == job_id, queued).values(published_at=None))


# Statements are cached: dispatchers run these several times a second, and making one takes longer than running it.
@cache
def _expired(job_class: type[Job]) -> Select[Any]:
    return select(job_class.id).where(_is_expired(job_class)).order_by(job_class.id)


@cache
def _unpublished(job_class: type[Job]) -> Select[Any]:
    long_ago = job_class.published_at < FromNow(bindparam("seconds", type_=Float))
    due = or_(job_class.published_at.is_(None), long_ago)
    query = select(job_class.id).where(job_class.state == JobState.QUEUED, due)
    return query.order_by(job_class.id).limit(bindparam("most"))


def expired_jobs(session: Session, job_class: type[Job]) -> Sequence[str]:
    """The ids of the jobs whose leases expired."""
    return session.scalars(_expired(job_class)).all()


def take_back_expired(
    session: Session, job_class: type[Job], max_attempts: int, job_id: str | None = None
) -> list[Job]:
    """Queue the jobs again whose leases expired, or one of them. Returns those that are over instead.

    A job is over if it was cancelled meanwhile, or if it has lost `max_attempts` workers since it last made progress.
    """
    expired = select(job_class).where(_is_expired(job_class))
    if job_id is not None:
        expired = expired.where(job_class.id == job_id)
    jobs = session.scalars(expired.with_for_update(skip_locked=True)).all()
    for job in jobs:
        job.losses += 1
        if job.cancel_requested:
            finish(session, job, JobState.CANCELLED)
        elif job.losses >= max_attempts:
            error = f"its worker was lost {job.losses} times without getting on; accepted: fewer than {max_attempts}"
            finish(session, job, JobState.FAILED, error)
        else:
            _requeue(session, job)
    return [job for job in jobs if job.state in FINAL_STATES]


def _requeue(session: Session, job: Job) -> None:
    job.state = JobState.QUEUED
    job.published_at = None
    job.lease_owner = job.lease_expires_at = None
    add_event(session, job, "requeued", attempt=job.attempt)


def add_tasks(session: Session, job: TuningJob, step_indices: list[int]) -> list[str]:
    """Add a task for each of these steps that has none. Returns the ids of all the job's tasks, by step.

    The caller holds the lock on the job's row, so no task is made twice, and none for a job that is over.
    """
    of_the_job = select(TuningTask).where(TuningTask.job_id == job.id).order_by(TuningTask.step_index)
    there = {task.step_index for task in session.scalars(of_the_job)}
    missing = [i for i in step_indices if i not in there]
    session.add_all(TuningTask(job_id=job.id, step_index=i, request={}, request_id=job.request_id) for i in missing)
    return [task.id for task in session.scalars(of_the_job)]


def unpublished(session: Session, job_class: type[Job], published_before: timedelta, limit: int = 100) -> list[str]:
    """Queued jobs that were never published, or so long ago that the message may have been lost."""
    parameters = {"seconds": -published_before.total_seconds(), "most": limit}
    return list(session.scalars(_unpublished(job_class), parameters))


def mark_published(session: Session, job_class: type[Job], job_ids: list[str]) -> None:
    named = job_class.id.in_(job_ids)
    session.execute(select(job_class.id).where(named).order_by(job_class.id).with_for_update())
    session.execute(update(job_class).where(named).values(published_at=FromNow()))


def count_queued(session: Session, job_class: type[Job], *conditions: ColumnElement[bool]) -> int:
    """The number of jobs that wait for a worker and fulfil the conditions."""
    return session.scalar(select(func.count()).where(job_class.state == JobState.QUEUED, *conditions)) or 0


def next_tuning_jobs(session: Session, limit: int = 10) -> Sequence[str]:
    """Queued tuning jobs by the turns of the keys that asked for them, and by age.

    A job's place is the number of jobs of its key that are run or queued before it. Among equals the key goes first
    whose last job was begun the longest ago.
    """
    owner = func.coalesce(TuningJob.owner, "")
    before = func.row_number().over(partition_by=owner, order_by=TuningJob.id)
    queued = select(TuningJob.id, owner.label("owner"), before.label("before"))
    waiting = queued.where(TuningJob.state == JobState.QUEUED).subquery()
    running = select(owner.label("owner"), func.count().label("jobs")).where(TuningJob.state == JobState.RUNNING)
    at_work = running.group_by(owner).subquery()
    begun = aliased(TuningJob)
    last = select(func.max(begun.started_at))
    last_begun = case(
        (waiting.c.owner == "", last.where(begun.owner.is_(None)).scalar_subquery()),
        else_=last.where(begun.owner == waiting.c.owner).scalar_subquery(),
    )
    query = select(waiting.c.id).outerjoin(at_work, at_work.c.owner == waiting.c.owner)
    place = waiting.c.before + func.coalesce(at_work.c.jobs, 0)
    return session.scalars(query.order_by(place, last_begun.is_not(None), last_begun, waiting.c.id).limit(limit)).all()
