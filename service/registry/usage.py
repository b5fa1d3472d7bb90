"""The use of networks and devices by jobs, added up by day, API key, model and kind of job."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any, NamedTuple, Self

from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.registry.tables import TuningJob, UsageKind, UsageTotal
from service.registry.types import utc_now

_TOTALS: Table = UsageTotal.__table__  # type: ignore[assignment]
_FIGURES = ("network_calls", "network_rows", "device_seconds")


@dataclass(frozen=True)
class Use:
    """Use of a network and a device.

    Attributes:
        network_calls: calls of the network. A job that shares a call with others has a share of it.
        network_rows: samples put through the network.
        device_seconds: the time of one worker, which has one device.
    """

    network_calls: float = 0.0
    network_rows: float = 0.0
    device_seconds: float = 0.0

    def __add__(self, other: Self) -> "Use":
        return Use(*(getattr(self, name) + getattr(other, name) for name in _FIGURES))

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in _FIGURES)


NOTHING_USED = Use()


class Payer(NamedTuple):
    """Whose total a job's use is added to."""

    owner: str | None
    model_id: str
    kind: UsageKind


def add_to_job(job: TuningJob, use: Use) -> None:
    """Note what a tuning job used. It is added to the day's total when the job ends."""
    job.used_calls += int(use.network_calls)
    job.used_rows += int(use.network_rows)
    job.used_seconds += use.device_seconds


def charge_tuning_job(session: Session, job: TuningJob) -> None:
    """Add what a tuning job used to the total of its key, in the transaction that ends the job."""
    used = Use(job.used_calls, job.used_rows, job.used_seconds)
    add_usage(session, [(Payer(job.owner, job.model_id, UsageKind.TUNING), used)])


def add_usage(session: Session, used: Iterable[tuple[Payer, Use]]) -> None:
    """Add to the totals of this day, in UTC.

    It comes last in its transaction, and goes by the totals' ids: the locks on these rows make other workers wait, and
    all that wait for them hold no others that this transaction needs.
    """
    totals: defaultdict[Payer, Use] = defaultdict(Use)
    for payer, use in used:
        totals[payer] += use
    day = utc_now().date()
    rows = [
        {"id": _total_id(day, payer), "day": day, **payer._asdict(), **{name: getattr(use, name) for name in _FIGURES}}
        for payer, use in totals.items()
        if use
    ]
    if rows:
        connection = session.connection()
        connection.execute(_add(connection.dialect.name), sorted(rows, key=lambda row: row["id"]))


def first_total_id(day: date) -> str:
    """An id that sorts before those of all totals of a day and of later ones."""
    return f"usg_{day.isoformat().replace('-', '')}"


def _total_id(day: date, payer: Payer) -> str:
    return f"{first_total_id(day)}_{hashlib.sha256(json.dumps(payer).encode()).hexdigest()[:32]}"


@cache
def _add(dialect: str) -> Any:
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    statement = insert(_TOTALS)
    sums = {name: _TOTALS.c[name] + statement.excluded[name] for name in _FIGURES}
    return statement.on_conflict_do_update(index_elements=["id"], set_=sums)
