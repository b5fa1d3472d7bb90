"""Sampling jobs: taken by workers many at a time, finished many at a time, joined where they are parts of one."""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import Float, Row, Select, Table, bindparam, case, delete, exists, insert, or_, select, update
from sqlalchemy.orm import Session, aliased

from service.registry.jobs import Claim, claimed_by, finish, hand_back
from service.registry.tables import FINAL_STATES, JobState, RegistryChanges, SampleJob
from service.registry.types import FromNow, first_id, utc_now

PATIENCE_SECONDS = 1.0  # how long jobs of models that a worker holds may go before those of others
LATE = "dropped: no worker was free before its deadline"


@dataclass(frozen=True)
class SampleClaim(Claim):
    """A claim, and the job as it was claimed: a row with its columns, as making an object of it takes longer than the
    query."""

    job: SampleJob
    claimed_at: datetime = field(default_factory=utc_now)


@dataclass(frozen=True)
class Ended:
    """How a job ended, as far as whoever waits for it wants to know."""

    job_id: str
    state: JobState
    artifact: str | None = None
    artifact_row: int = 0
    error: str | None = None
    parent_id: str | None = None
    num_images: int = 0  # that no worker need make any more


def ended(
    job: SampleJob, state: JobState, artifact: str | None = None, row: int = 0, error: str | None = None
) -> Ended:
    """How a job that no other waits for ended."""
    return Ended(job.id, state, artifact, row, error, job.parent_id, 0 if job.num_parts else job.num_images)


_ROWS: Table = SampleJob.__table__  # type: ignore[assignment]


def _next_jobs(*order: Any) -> Select[Any]:
    waiting = select(_ROWS).where(SampleJob.state == JobState.QUEUED, SampleJob.num_parts == 0)
    ordered = waiting.order_by(SampleJob.priority, *order, SampleJob.id).limit(bindparam("most"))
    return ordered.with_for_update(skip_locked=True)


# Made once: a worker claims before every few steps, and making a statement takes longer than running it.
_NEXT = _next_jobs()
_HELD = SampleJob.model_id.in_(bindparam("models", expanding=True))
_NEXT_BY_MODEL = _next_jobs(case((_HELD, 0), (SampleJob.created_at < bindparam("impatient_since"), 0), else_=1))
_ADD = insert(_ROWS)
_CLAIM = (
    update(_ROWS)
    .where(_ROWS.c.id.in_(bindparam("ids", expanding=True)))
    .values(claimed_by(SampleJob, bindparam("by"), bindparam("seconds", type_=Float), bindparam("now")))
)


def add_samples(session: Session, jobs: Sequence[SampleJob]) -> None:
    """Store jobs made by hand, as rows: as objects of the session they would take longer."""
    if not jobs:
        return
    for job, column in itertools.product(jobs, _ROWS.columns):
        if column.default is not None and getattr(job, column.key) is None:
            default: Any = column.default
            setattr(job, column.key, default.arg(None) if default.is_callable else default.arg)
    rows = [{column.key: getattr(job, column.key) for column in _ROWS.columns} for job in jobs]
    session.connection().execute(_ADD, rows)


def claim_samples(
    session: Session, owner: str, lease_seconds: float, room: int, models: Collection[str], only_these: bool
) -> tuple[list[SampleClaim], list[Ended], bool]:
    """Take the jobs to be run next, as many as make up to `room` images together; and those too late to be run; and
    whether there may be more.

    Jobs come by priority and age. Those of `models`, which the worker holds, go first, until another has waited for
    `PATIENCE_SECONDS`; with `only_these`, the first of another model ends the search.
    """
    now, most = utc_now(), max(room, 1)
    parameters: dict[str, Any] = {"most": most}
    if models:
        parameters |= {"models": list(models), "impatient_since": now - timedelta(seconds=PATIENCE_SECONDS)}
    candidates: Any = session.connection().execute(_NEXT_BY_MODEL if models else _NEXT, parameters).all()
    allowed = set(models)
    taken: list[SampleJob] = []
    late: list[SampleJob] = []  # as objects
    for job in candidates:
        if job.deadline_at is not None and job.deadline_at < now:
            late.append(session.get_one(SampleJob, job.id))
        elif job.num_images > room or (job.model_id not in allowed and (only_these or taken)):
            break
        else:
            if job.model_id not in allowed:
                allowed = {job.model_id}  # a worker that loads one may have to give up those it has
            taken.append(job)
            room -= job.num_images
    for job in late:
        finish(session, job, JobState.FAILED, LATE)
    if taken:
        values = {"ids": [job.id for job in taken], "by": owner, "seconds": lease_seconds, "now": now}
        session.connection().execute(_CLAIM, values)
    claims = [SampleClaim(SampleJob, job.id, job.fencing_token + 1, job.request_id, job) for job in taken]
    more = len(taken) + len(late) < len(candidates) or len(candidates) == most
    return claims, [ended(job, job.state, error=job.error) for job in late], more


def renew_samples(session: Session, claims: Collection[SampleClaim], lease_seconds: float) -> tuple[set[str], set[str]]:
    """Extend the leases; the ids of jobs that are no longer ours, and of those to be cancelled."""
    rows = _locked(session, claims)
    ours = {claim.job_id for claim in claims if _is_ours(claim, rows)}
    end = FromNow(lease_seconds)
    session.execute(update(SampleJob).where(SampleJob.id.in_(ours)).values(lease_expires_at=end))
    return {claim.job_id for claim in claims} - ours, {job_id for job_id in ours if rows[job_id].cancel_requested}


def hand_back_samples(session: Session, claims: Collection[SampleClaim]) -> None:
    """Queue those jobs again that are still ours: their worker stops before they are done."""
    rows = _locked(session, claims)
    for claim in claims:
        if _is_ours(claim, rows):
            hand_back(session, session.get_one(SampleJob, claim.job_id, populate_existing=True))


_END = (
    update(_ROWS)
    .where(
        _ROWS.c.id == bindparam("job_id"),
        _ROWS.c.fencing_token == bindparam("token"),
        _ROWS.c.state == JobState.RUNNING,
    )
    .values(
        state=bindparam("new_state"),
        progress=bindparam("new_progress"),
        error=bindparam("new_error"),
        finished_at=bindparam("now"),
        lease_owner=None,
        lease_expires_at=None,
        artifact=bindparam("new_artifact"),
        artifact_row=bindparam("new_row"),
    )
)


def finish_samples(session: Session, ends: Sequence[tuple[SampleClaim, Ended]]) -> list[Ended]:
    """Enter the final state of each job that is still ours; those."""
    if not ends:
        return []
    ends = sorted(ends, key=lambda end: end[0].job_id)  # the order in which everybody locks
    entered = session.connection().execute(_END, [_end_values(claim, ended) for claim, ended in ends]).rowcount
    if entered == len(ends):
        return [ended for _, ended in ends]
    rows = _locked(session, [claim for claim, _ in ends])  # as the update left them
    return [ended for claim, ended in ends if _is_ours(claim, rows, ended.state)]


def _end_values(claim: SampleClaim, ended: Ended) -> dict[str, object]:
    error = ended.error[:2000] if ended.error else None
    values: dict[str, object] = {"job_id": claim.job_id, "token": claim.fencing_token, "now": utc_now()}
    values |= {"new_state": ended.state, "new_progress": float(ended.state == JobState.SUCCEEDED), "new_error": error}
    return values | {"new_artifact": ended.artifact, "new_row": ended.artifact_row}


def join_parts(session: Session, parent_id: str, join: Callable[[list[tuple[str, int, int]]], str]) -> Ended | None:
    """Bring a request that was split up to date with its parts; how it ended, if it is over by that.

    Args:
        join: makes one file of the parts' images: of files, each with the first row and the number of rows.
    """
    parent = session.get_one(SampleJob, parent_id, with_for_update=True, populate_existing=True)
    if parent.state in FINAL_STATES:
        return None
    parts = session.scalars(select(SampleJob).filter_by(parent_id=parent_id).order_by(SampleJob.first_image)).all()
    failed = next((part for part in parts if part.state == JobState.FAILED), None)
    succeeded = sum(part.state == JobState.SUCCEEDED for part in parts)
    if failed is not None:
        finish(session, parent, JobState.FAILED, failed.error)
    elif succeeded == len(parts):
        parent.artifact = join([(part.artifact or "", part.artifact_row, part.num_images) for part in parts])
        finish(session, parent, JobState.SUCCEEDED)
    elif all(part.state in FINAL_STATES for part in parts):
        finish(session, parent, JobState.CANCELLED)
    else:
        parent.state, parent.progress = JobState.RUNNING, succeeded / len(parts)
        parent.started_at = parent.started_at or utc_now()
        return None
    return ended(parent, parent.state, parent.artifact, error=parent.error)


@cache  # made when a dispatcher first asks; nobody else does
def _forgotten_parents() -> Select[Any]:
    part = aliased(SampleJob)
    parts = select(part.id).where(part.parent_id == SampleJob.id)
    return select(SampleJob.id).where(
        SampleJob.state.in_((JobState.QUEUED, JobState.RUNNING)),
        SampleJob.num_parts > 0,
        or_(~exists(parts.where(part.state.not_in(FINAL_STATES))), exists(parts.where(part.state == JobState.FAILED))),
    )


_WAITING = select(exists().where(SampleJob.state == JobState.QUEUED, SampleJob.num_parts == 0))


def forgotten_parents(session: Session) -> list[str]:
    """Requests that are not over although a part failed, or all are: whoever ended these did not live to say so."""
    return list(session.scalars(_forgotten_parents()))


def samples_wait(session: Session) -> bool:
    """Whether a job is queued."""
    return bool(session.scalar(_WAITING))


def models_sampled_last(session: Session, count: int) -> list[tuple[str, dict[str, Any]]]:
    """The models of the last samples, the newest first, each with its last request."""
    jobs = session.scalars(select(SampleJob).order_by(SampleJob.id.desc()).limit(1000))
    requests: dict[str, dict[str, Any]] = {}
    for job in jobs:
        requests.setdefault(job.model_id, job.request)
    return list(requests.items())[:count]


def delete_old_samples(session: Session, before: datetime, limit: int) -> int:
    """Delete requests that were over by then, with their parts, up to so many rows; how many. Their files stay."""
    whole, part = aliased(SampleJob), aliased(SampleJob)
    over = whole.state.in_(FINAL_STATES), whole.finished_at < before, whole.parent_id.is_(None)
    # Ids are in the order of time: those to be deleted come first.
    old = select(whole.id).where(whole.id < first_id("smp", before), *over).order_by(whole.id).limit(limit)
    ids = list(session.scalars(old))
    parts = session.scalars(select(part.id).where(part.parent_id.in_(ids), part.state.in_(FINAL_STATES)).limit(limit))
    deleted = [*parts] or ids  # parts first, as they refer to the whole
    session.execute(
        delete(SampleJob).where(SampleJob.id.in_(deleted)), execution_options={"synchronize_session": False}
    )
    return len(deleted)


def unreferenced(session: Session, artifacts: Collection[str]) -> set[str]:
    """Those files that no sample job refers to."""
    there = select(SampleJob.artifact).where(SampleJob.artifact.in_(artifacts)).distinct()
    return set(artifacts) - set(session.scalars(there))


_CHANGES = select(RegistryChanges.number)


def changes(session: Session) -> int:
    """How often models, schedules and aliases have changed."""
    return session.connection().scalar(_CHANGES) or 0


_LOCK = (
    select(_ROWS.c.id, _ROWS.c.state, _ROWS.c.fencing_token, _ROWS.c.cancel_requested)
    .where(_ROWS.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(_ROWS.c.id)
    .with_for_update()
)


def _locked(session: Session, claims: Collection[SampleClaim]) -> dict[str, Row[str, JobState, int, bool]]:
    rows = session.connection().execute(_LOCK, {"ids": [claim.job_id for claim in claims]})
    return {row.id: row for row in rows}


def _is_ours(
    claim: SampleClaim, rows: dict[str, Row[str, JobState, int, bool]], state: JobState = JobState.RUNNING
) -> bool:
    row = rows.get(claim.job_id)
    return row is not None and row.fencing_token == claim.fencing_token and row.state == state
