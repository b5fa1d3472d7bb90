"""Deleting what is kept for a time of its own: events of tuning jobs, rejected schedules, and the audit log.

Each function looks at up to `limit` rows from a place on, by the primary key, along which rows become younger. It
returns the place to go on from, or None if there is nothing older.
"""

from datetime import datetime

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session

from service.registry.tables import (
    FINAL_STATES,
    AuditEntry,
    SampleJob,
    Schedule,
    ScheduleAlias,
    ScheduleStatus,
    TuningJob,
    TuningJobEvent,
)
from service.registry.types import first_id


def delete_old_events(session: Session, before: datetime, limit: int, after: int | None) -> int | None:
    """Delete events of tuning jobs that are over."""
    query = select(TuningJobEvent.id, TuningJobEvent.created_at, TuningJob.state).join(
        TuningJob, TuningJob.id == TuningJobEvent.job_id
    )
    rows = session.execute(query.where(TuningJobEvent.id > (after or 0)).order_by(TuningJobEvent.id).limit(limit)).all()
    old = [row for row in rows if row.created_at < before]
    ids = [row.id for row in old if row.state in FINAL_STATES]
    session.execute(
        delete(TuningJobEvent).where(TuningJobEvent.id.in_(ids)), execution_options={"synchronize_session": False}
    )
    last: int | None = old[-1].id if len(old) == limit else None
    return last


def delete_old_rejected(session: Session, before: datetime, limit: int, after: str | None) -> str | None:
    """Delete schedules that were rejected, unless an alias or a sampling job names them."""
    old = select(Schedule).where(Schedule.id > (after or ""), Schedule.id < first_id("sch", before))
    old = old.where(Schedule.status == ScheduleStatus.REJECTED).order_by(Schedule.id).limit(limit)
    named = exists().where(ScheduleAlias.schedule_id == Schedule.id) | exists().where(
        SampleJob.schedule_id == Schedule.id
    )
    rows = session.execute(old.add_columns(named)).all()
    for schedule, is_named in rows:
        if not is_named:
            session.delete(schedule)
    last: str | None = rows[-1][0].id if len(rows) == limit else None
    return last


def delete_old_audit(session: Session, before: datetime, limit: int, after: str | None) -> str | None:
    """Delete entries of the audit log."""
    old = select(AuditEntry.id).where(AuditEntry.id > (after or ""), AuditEntry.id < first_id("aud", before))
    ids = session.scalars(old.order_by(AuditEntry.id).limit(limit)).all()
    session.execute(delete(AuditEntry).where(AuditEntry.id.in_(ids)), execution_options={"synchronize_session": False})
    return ids[-1] if len(ids) == limit else None
