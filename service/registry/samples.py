"""Sampling jobs: workers claim and finish many at a time, and parts of a large request are joined."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Executable,
    Float,
    Row,
    Select,
    String,
    Table,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from service.registry.jobs import Claim, claimed_by, finish, hand_back
from service.registry.tables import FINAL_STATES, JobState, Model, RegistryChanges, SampleJob, UsageKind
from service.registry.types import FromNow, first_id, utc_now
from service.registry.usage import NOTHING_USED, Payer, Use, add_usage

# Jobs of models that a worker has loaded go before others, until one of the others has waited this long.
PATIENCE_SECONDS = 1.0
# A job of low priority that has waited this long takes turns with the urgent ones.
AGEING_SECONDS = 30.0
LATE = "dropped: no worker was free before its deadline"


@dataclass(frozen=True)
class SampleClaim(Claim):
    """A claim, and the row of the claimed job. It is a plain row: an ORM object takes longer to make than the query."""

    job: SampleJob
    claimed_at: datetime = field(default_factory=utc_now)


@dataclass(frozen=True)
class Ended:
    """How a job ended: what a request that waits for it needs to know.

    Attributes:
        num_images: images that no worker needs to make any more.
        flagged: the numbers of images that a safety checker held back; None without one.
        used: what the attempt that ended took.
    """

    job_id: str
    state: JobState
    artifact: str | None = None
    artifact_row: int = 0
    error: str | None = None
    parent_id: str | None = None
    num_images: int = 0
    flagged: list[int] | None = None
    used: Use = NOTHING_USED


def ended(
    job: SampleJob,
    state: JobState,
    artifact: str | None = None,
    row: int = 0,
    error: str | None = None,
    flagged: list[int] | None = None,
) -> Ended:
    """The end of a job. The images of a request that was split are counted with its parts."""
    num_images = 0 if job.num_parts else job.num_images
    return Ended(job.id, state, artifact, row, error, job.parent_id, num_images, flagged)


_ROWS: Table = SampleJob.__table__  # type: ignore[assignment]


_WAITS = (SampleJob.state == JobState.QUEUED) & (SampleJob.num_parts == 0)
_HELD = SampleJob.model_id.in_(bindparam("models", expanding=True))
_PREFERRED = or_(_HELD, SampleJob.created_at < bindparam("impatient_since"))
_OWNER = func.coalesce(SampleJob.owner, "")


def _after(column: InstrumentedAttribute[Any], before: ColumnElement[Any] | None = None) -> ColumnElement[Any]:
    """The least value of queued jobs, beyond another one if that is given. It is read off an index."""
    least = select(func.min(column)).where(SampleJob.state == JobState.QUEUED)
    return (least if before is None else least.where(column > before)).scalar_subquery()


def _flows() -> Select[Any]:
    """What one key asked for at one priority is a flow: all flows that queued jobs may be of. The queue is not read.

    Each has its `owner`, "" for none, and `priority`; `images`, the number that is being sampled; and `last_begun`,
    when its last job was begun, None if none was. There are pairs of owner and priority that no queued job has.
    """
    owners = select(literal("", String).label("owner")).cte("owner", recursive=True)
    owners = owners.union_all(select(_after(SampleJob.owner, owners.c.owner)).where(owners.c.owner.is_not(None)))
    priorities = select(_after(SampleJob.priority).label("priority")).cte("priority", recursive=True)
    next_priority = _after(SampleJob.priority, priorities.c.priority)
    priorities = priorities.union_all(select(next_priority).where(priorities.c.priority.is_not(None)))
    pairs = select(owners.c.owner, priorities.c.priority).join(priorities, true())
    flow = pairs.where(owners.c.owner.is_not(None), priorities.c.priority.is_not(None)).cte("flow")
    running = select(_OWNER.label("owner"), SampleJob.priority, func.sum(SampleJob.num_images).label("images"))
    running = running.where(SampleJob.state == JobState.RUNNING, SampleJob.num_parts == 0)
    at_work = running.group_by(_OWNER, SampleJob.priority).cte("running")
    begun = aliased(SampleJob)
    last = select(begun.started_at).where(begun.priority == flow.c.priority, begun.started_at.is_not(None))
    last = last.order_by(begun.started_at.desc()).limit(1)  # SQLite would look for the greatest among all of no owner.
    last_begun = case(
        (flow.c.owner == "", last.where(begun.owner.is_(None)).scalar_subquery()),
        else_=last.where(begun.owner == flow.c.owner).scalar_subquery(),
    )
    is_same = and_(at_work.c.owner == flow.c.owner, at_work.c.priority == flow.c.priority)
    flows = select(flow, func.coalesce(at_work.c.images, 0).label("images"), last_begun.label("last_begun"))
    return flows.outerjoin(at_work, is_same)


def _head_of_flow(is_owned: bool, is_preferred: bool) -> Select[str, int, datetime]:
    """The oldest `most` queued jobs of an owner and a priority that are preferred, or those that are not."""
    of_owner = SampleJob.owner == bindparam("of_owner") if is_owned else SampleJob.owner.is_(None)
    jobs = select(SampleJob.id, SampleJob.num_images, SampleJob.created_at)
    jobs = jobs.where(_WAITS, of_owner, SampleJob.priority == bindparam("of_priority"))
    jobs = jobs.where(_PREFERRED if is_preferred else ~_PREFERRED)
    return jobs.order_by(SampleJob.id).limit(bindparam("most"))


def _first(jobs: Select[Any]) -> Select[Any]:
    return jobs.limit(bindparam("most")).with_for_update(of=_ROWS, skip_locked=True)


def _several_flows() -> Select[Any]:
    """Whether more than one flow may be queued: the least and the greatest owner and priority are read off indexes.

    Requests that were split are queued while their parts are, and have their owner and priority.
    """
    queued = SampleJob.state == JobState.QUEUED

    def first(column: InstrumentedAttribute[Any], order: ColumnElement[Any]) -> ColumnElement[Any]:
        return select(column).where(queued, column.is_not(None)).order_by(order).limit(1).scalar_subquery()

    def ends_differ(column: InstrumentedAttribute[Any]) -> ColumnElement[bool]:
        return func.coalesce(first(column, column.asc()) != first(column, column.desc()), False)

    # Both columns are of an index. SQLite would look for `SELECT *` in the table.
    unowned = select(SampleJob.state).where(queued, SampleJob.owner.is_(None)).limit(1).scalar_subquery()
    some_unowned = and_(first(SampleJob.owner, SampleJob.owner.asc()).is_not(None), unowned.is_not(None))
    return select(or_(ends_differ(SampleJob.priority), ends_differ(SampleJob.owner), some_unowned))


# Statements are made once: a worker claims every few steps, and making a statement takes longer than running it.
_SEVERAL_FLOWS = _several_flows()
# Jobs of one flow have one priority, so that those which have aged are just the oldest. An index has them in order.
_OF_ONE_FLOW = select(_ROWS).where(_WAITS).order_by(SampleJob.priority, SampleJob.id)
_NEXT_PREFERRED, _NEXT_OTHERS = _first(_OF_ONE_FLOW.where(_PREFERRED)), _first(_OF_ONE_FLOW.where(~_PREFERRED))
_FLOWS = _flows()
_HEADS = {(owned, preferred): _head_of_flow(owned, preferred) for owned in (True, False) for preferred in (True, False)}
_LOCK_IF_FREE = select(_ROWS).where(_ROWS.c.id.in_(bindparam("ids", expanding=True))).with_for_update(skip_locked=True)
_ADD = insert(_ROWS)
_COLUMNS = tuple(column.key for column in _ROWS.columns)
_DEFAULTS: dict[str, Any] = {column.key: column.default for column in _ROWS.columns if column.default is not None}
_CLAIM = (
    update(_ROWS)
    .where(_ROWS.c.id.in_(bindparam("ids", expanding=True)))
    .values(claimed_by(SampleJob, bindparam("by"), bindparam("seconds", type_=Float), bindparam("now")))
)


def add_samples(session: Session, jobs: Sequence[SampleJob]) -> None:
    """Store new jobs with one Core insert, which is faster than the ORM's."""
    if not jobs:
        return
    for job in jobs:
        for name, default in _DEFAULTS.items():
            if getattr(job, name) is None:
                setattr(job, name, default.arg(None) if default.is_callable else default.arg)
    # What was set is in an object's own dictionary. Reading each column as an attribute takes as long as the insert.
    session.connection().execute(_ADD, [{name: vars(job).get(name) for name in _COLUMNS} for job in jobs])


def claim_samples(
    session: Session,
    owner: str,
    lease_seconds: float,
    room: int,
    models: Collection[str],
    only_these: bool,
    is_empty: bool = False,
) -> tuple[list[SampleClaim], list[Ended], bool]:
    """Claim the next jobs, up to `room` images together.

    Jobs come by priority, by turns of the keys that asked for them, and by age. One that has waited for
    `AGEING_SECONDS` is as urgent as any. Jobs of `models`, which the worker has loaded, go first, until another has
    waited for `PATIENCE_SECONDS`. With `only_these`, the first job of another model ends the search.

    A job waits until there is room for all its images, and no other overtakes it. A worker that `is_empty`, which has
    no images at all, takes the first job however large it is: no worker might ever have that much room.

    Returns:
        The claims, the ends of jobs whose deadline has passed, and whether there may be more jobs.
    """
    now, most = utc_now(), max(room, 1)
    parameters = {
        "most": most,
        "models": list(models),
        # Without any model that is held, all jobs are the same.
        "impatient_since": now - timedelta(seconds=PATIENCE_SECONDS) if models else now + timedelta(days=1),
        "aged_since": now - timedelta(seconds=AGEING_SECONDS),
    }
    connection = session.connection()
    candidates, are_more = _candidates(connection, parameters)
    allowed = set(models)
    taken: list[SampleJob] = []
    late: list[SampleJob] = []
    for job in candidates:
        fits = job.num_images <= room or (is_empty and not taken)
        if job.deadline_at is not None and job.deadline_at < now:
            late.append(session.get_one(SampleJob, job.id))
        elif not fits or (job.model_id not in allowed and (only_these or taken)):
            break
        else:
            if job.model_id not in allowed:
                allowed = {job.model_id}  # Loading this model may drop the loaded ones.
            taken.append(job)
            room -= job.num_images
    for job in late:
        finish(session, job, JobState.FAILED, LATE)
    if taken:
        values = {"ids": [job.id for job in taken], "by": owner, "seconds": lease_seconds, "now": now}
        session.connection().execute(_CLAIM, values)
    claims = [SampleClaim(SampleJob, job.id, job.fencing_token + 1, job.request_id, job) for job in taken]
    more = len(taken) + len(late) < len(candidates) or are_more
    return claims, [ended(job, job.state, error=job.error) for job in late], more


def renew_samples(session: Session, claims: Collection[SampleClaim], lease_seconds: float) -> tuple[set[str], set[str]]:
    """Extend the leases. Returns the ids of jobs that other workers have claimed, and of jobs to be cancelled."""
    rows = _locked(session, claims)
    held = {claim.job_id for claim in claims if _is_held(claim, rows)}
    end = FromNow(lease_seconds)
    session.execute(update(SampleJob).where(SampleJob.id.in_(held)).values(lease_expires_at=end))
    return {claim.job_id for claim in claims} - held, {job_id for job_id in held if rows[job_id].cancel_requested}


def hand_back_samples(session: Session, claims: Collection[SampleClaim]) -> None:
    """Queue jobs again whose worker stops before they are done. Jobs that another worker has claimed are skipped."""
    rows = _locked(session, claims)
    for claim in claims:
        if _is_held(claim, rows):
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
        flagged=bindparam("new_flagged", type_=_ROWS.c.flagged.type),
    )
)


def finish_samples(session: Session, ends: Sequence[tuple[SampleClaim, Ended]]) -> list[Ended]:
    """Enter the final state of each job whose claim still holds, and add what it used to the total of its key.

    Returns the ends that were entered.
    """
    if not ends:
        return []
    ends = sorted(ends, key=lambda end: end[0].job_id)  # All code locks jobs by id, which prevents deadlocks.
    entered = session.connection().execute(_END, [_end_values(claim, ended) for claim, ended in ends]).rowcount
    if entered < len(ends):
        rows = _locked(session, [claim for claim, _ in ends])
        ends = [(claim, ended) for claim, ended in ends if _is_held(claim, rows, ended.state)]
    charged = [(claim.job, ended.used) for claim, ended in ends if not claim.job.is_made_again]
    add_usage(session, ((Payer(job.owner, job.model_id, UsageKind.SAMPLING), used) for job, used in charged))
    return [ended for _, ended in ends]


def _end_values(claim: SampleClaim, ended: Ended) -> dict[str, object]:
    error = ended.error[:2000] if ended.error else None
    values: dict[str, object] = {"job_id": claim.job_id, "token": claim.fencing_token, "now": utc_now()}
    values |= {"new_state": ended.state, "new_progress": float(ended.state == JobState.SUCCEEDED), "new_error": error}
    return values | {
        "new_artifact": ended.artifact,
        "new_row": ended.artifact_row,
        "new_flagged": ended.flagged,
    }


def join_parts(session: Session, parent_id: str, join: Callable[[list[tuple[str, int, int]]], str]) -> Ended | None:
    """Update a request that was split from the states of its parts. Returns its end if it is over.

    Args:
        join: makes one file of the parts' images, given (file, first row, number of rows) of each part.
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
        if any(part.flagged is not None for part in parts):
            parent.flagged = [part.first_image + k for part in parts for k in part.flagged or []]
        finish(session, parent, JobState.SUCCEEDED)
    elif all(part.state in FINAL_STATES for part in parts):
        finish(session, parent, JobState.CANCELLED)
    else:
        parent.state, parent.progress = JobState.RUNNING, succeeded / len(parts)
        parent.started_at = parent.started_at or utc_now()
        return None
    return ended(parent, parent.state, parent.artifact, error=parent.error, flagged=parent.flagged)


def fail_parent(session: Session, parent_id: str, error: str) -> Ended | None:
    """End a request that was split, as its parts cannot be joined. None if it is over already."""
    parent = session.get_one(SampleJob, parent_id, with_for_update=True, populate_existing=True)
    if parent.state in FINAL_STATES:
        return None
    finish(session, parent, JobState.FAILED, error)
    return ended(parent, parent.state, error=parent.error)


def sample_again(session: Session, job_id: str, artifact: str) -> SampleJob:
    """Queue a job again whose images, in this file, were damaged. One that has other images by now stays as it is.

    A request that was split is sampled as a whole this time.
    """
    job = session.get_one(SampleJob, job_id, with_for_update=True, populate_existing=True)
    if job.state == JobState.SUCCEEDED and job.artifact == artifact:
        job.state, job.progress, job.losses = JobState.QUEUED, 0.0, 0
        job.artifact, job.artifact_row, job.num_parts, job.flagged = None, 0, 0, None
        job.started_at = job.finished_at = job.deadline_at = None
        job.cancel_requested = False
        job.is_made_again = True
    return job


@cache  # Only dispatchers need this statement, so it is made when it is first used.
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
    """Open requests of which a part failed or all parts are over: their worker died before it joined them."""
    return list(session.scalars(_forgotten_parents()))


def samples_wait(session: Session) -> bool:
    """Whether any sampling job is queued for a worker."""
    return bool(session.scalar(_WAITING))


def _candidates(connection: Connection, parameters: dict[str, Any]) -> tuple[Sequence[Any], bool]:
    """The rows of the next jobs in order, up to `most`, and whether there may be more. They are locked."""
    most = parameters["most"]
    if connection.scalar(_SEVERAL_FLOWS):
        ids = _next_of_flows(connection, parameters)
        rows = _lock_first(connection, ids, most)
        return rows, len(rows) == most or len(rows) < len(ids)
    preferred, others = _up_to_most(connection, _NEXT_PREFERRED, _NEXT_OTHERS, parameters)
    return [*preferred, *others], len(preferred) + len(others) == most


def _up_to_most(
    connection: Connection, first: Executable, then: Executable, parameters: dict[str, Any]
) -> tuple[Sequence[Row[Any]], Sequence[Row[Any]]]:
    """The rows of one query, and as many of another as `most` leaves."""
    rows = connection.execute(first, parameters).all()
    missing = parameters["most"] - len(rows)
    return rows, connection.execute(then, parameters | {"most": missing}).all() if missing else []


def _next_of_flows(connection: Connection, parameters: dict[str, Any]) -> list[str]:
    """The ids of the next jobs by urgency, whether their model is held, fairness among flows, and age.

    Flows take turns by images: a job's place is the number of images of its flow that are being sampled or queued
    before it. Among equals the flow goes first whose last job was begun the longest ago. Of each flow, the first `most`
    jobs are read, as no more can be claimed.
    """
    places = []
    for flow in connection.execute(_FLOWS).all():
        images, begun = flow.images, (flow.last_begun is not None, flow.last_begun or 0)
        for urgency, is_other, job in _head(connection, flow, parameters):
            places.append((urgency, is_other, images, begun, job.id))
            images += job.num_images
    return [place[-1] for place in sorted(places)]


def _head(connection: Connection, flow: Row[Any], parameters: dict[str, Any]) -> list[tuple[int, bool, Any]]:
    """The first jobs of a flow in its order: each with its urgency, and whether it is not preferred."""
    values = parameters | {"of_owner": flow.owner, "of_priority": flow.priority}
    is_owned, aged_since = flow.owner != "", parameters["aged_since"]
    preferred, others = _up_to_most(connection, _HEADS[is_owned, True], _HEADS[is_owned, False], values)
    found = [*((False, job) for job in preferred), *((True, job) for job in others)]
    jobs = [(0 if job.created_at < aged_since else flow.priority, is_other, job) for is_other, job in found]
    return sorted(jobs, key=lambda one: (*one[:2], one[2].id))


def _lock_first(connection: Connection, ids: Sequence[str], most: int) -> list[Any]:
    """The rows of the first `most` of these jobs that no other worker has locked or claimed. They are locked."""
    rows: list[Any] = []
    while ids and len(rows) < most:
        next_ids, ids = ids[: most - len(rows)], ids[most - len(rows) :]
        found = {row.id: row for row in connection.execute(_LOCK_IF_FREE, {"ids": next_ids})}
        # A row that another worker has claimed meanwhile was read again when it was locked.
        rows += [found[job_id] for job_id in next_ids if job_id in found and found[job_id].state == JobState.QUEUED]
    return rows


def models_sampled_last(session: Session, count: int) -> list[SampleJob]:
    """The last job of each of the models that were sampled last, newest first.

    Models whose last use did not succeed are left out. Jobs that no worker began are no use of a model, and of those
    that are being sampled it is not known yet, unless a worker was lost with them.
    """
    known = or_(SampleJob.state.in_(FINAL_STATES), SampleJob.losses > 0)
    used = select(SampleJob).join(Model).where(Model.deleted_at.is_(None))
    used = used.where(SampleJob.started_at.is_not(None), SampleJob.num_parts == 0, known)
    last: dict[str, SampleJob] = {}
    for job in session.scalars(used.order_by(SampleJob.id.desc()).limit(1000)):
        last.setdefault(job.model_id, job)
    return [job for job in last.values() if job.state == JobState.SUCCEEDED][:count]


def delete_old_samples(session: Session, before: datetime, limit: int) -> Sequence[str | None]:
    """Delete up to `limit` rows of the oldest requests that ended before a time, and their parts.

    Returns:
        For each deleted row its file, or None. Rows that are left may refer to the same file.
    """
    whole, part = aliased(SampleJob), aliased(SampleJob)
    over = whole.state.in_(FINAL_STATES), whole.finished_at < before, whole.parent_id.is_(None)
    # Ids rise with time, so the oldest rows come first.
    old = select(whole.id).where(whole.id < first_id("smp", before), *over).order_by(whole.id).limit(limit)
    ids = list(session.scalars(old))
    parts = session.scalars(select(part.id).where(part.parent_id.in_(ids), part.state.in_(FINAL_STATES)).limit(limit))
    deleted = [*parts] or ids  # Parts go first, as they refer to the whole.
    gone = delete(SampleJob).where(SampleJob.id.in_(deleted)).returning(SampleJob.artifact)
    return session.scalars(gone, execution_options={"synchronize_session": False}).all()


def unreferenced(session: Session, artifacts: Collection[str]) -> set[str]:
    """The files among `artifacts` that no sampling job refers to."""
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


def _is_held(
    claim: SampleClaim, rows: dict[str, Row[str, JobState, int, bool]], state: JobState = JobState.RUNNING
) -> bool:
    row = rows.get(claim.job_id)
    return row is not None and row.fencing_token == claim.fencing_token and row.state == state
