"""The versions of schedules."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.registry.tables import PUBLIC, Model, Schedule, ScheduleVersion


def next_version(session: Session, key: Mapping[str, Any], private_to: str = PUBLIC) -> int:
    """The next version of a setting, which is given as the columns of `Schedule.KEY`. No version is given twice.

    Versions of what is private to a key are counted apart from all others.

    The model's row stays locked until the transaction ends, so that two writers cannot get the same version.
    """
    session.get_one(Model, key["model_id"], with_for_update={"key_share": True})
    stored = session.scalar(select(func.max(Schedule.version)).filter_by(**key, private_to=private_to)) or 0
    last = session.scalar(select(ScheduleVersion).filter_by(**key, private_to=private_to))
    if last is None:
        last = ScheduleVersion(**key, private_to=private_to, newest=0)
        session.add(last)
    last.newest = max(last.newest, stored) + 1
    return last.newest
