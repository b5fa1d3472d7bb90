"""Reading what jobs used."""

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any, TypeVar

from sqlalchemy import Select, func, select, true
from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.http.errors import InvalidError
from service.http.fields import newest_first
from service.registry.keys import Scope
from service.registry.tables import ApiKey, Model, UsageTotal
from service.registry.usage import Use, first_total_id
from service.usage.schemas import UsageOut, UsageQuery

AnySelect = TypeVar("AnySelect", bound=Select[Any])

_SUMS = [func.sum(getattr(UsageTotal, name)) for name in ("network_calls", "network_rows", "device_seconds")]


def newest(session: Session, caller: Caller, query: UsageQuery) -> tuple[list[UsageOut], str | None]:
    """One page of the totals that the caller sees, the newest day first, and the cursor of the next.

    Raises: InvalidError.
    """
    rows, cursor = newest_first(session, _seen(select(UsageTotal), caller, query), UsageTotal.id, query)
    return _shown(session, rows), cursor


def by_key(session: Session, caller: Caller, query: UsageQuery) -> list[tuple[str, Use]]:
    """The sums of each API key that the caller sees, by its name, the most device seconds first."""
    sums = _seen(select(UsageTotal.owner, *_SUMS), caller, query).group_by(UsageTotal.owner)
    found = [(owner, Use(*figures)) for owner, *figures in session.execute(sums)]
    names = _names(session, ApiKey, {owner for owner, _ in found if owner is not None})
    found.sort(key=lambda each: -each[1].device_seconds)
    return [("no key" if owner is None else names.get(owner, owner), use) for owner, use in found]


def by_day(session: Session, caller: Caller, query: UsageQuery) -> dict[tuple[date, str], Use]:
    """The sums of each day and kind of job that the caller sees."""
    sums = _seen(select(UsageTotal.day, UsageTotal.kind, *_SUMS), caller, query)
    grouped = sums.group_by(UsageTotal.day, UsageTotal.kind).order_by(UsageTotal.day)
    return {(day, str(kind)): Use(*figures) for day, kind, *figures in session.execute(grouped)}


def _seen(select_from: AnySelect, caller: Caller, query: UsageQuery) -> AnySelect:
    """A query limited to the totals that match and that the caller sees: an admin sees all, others their key's own.

    Raises: InvalidError.
    """
    if query.since is not None and query.until is not None and query.since > query.until:
        message = f"since is {query.since}; accepted: up to until, which is {query.until}"
        raise InvalidError(message, ("query", "since"), str(query.since))
    found = select_from.where(true() if caller.may(Scope.ADMIN) else UsageTotal.owner == caller.owner)
    if query.since is not None:
        found = found.where(UsageTotal.id >= first_total_id(query.since))
    if query.until is not None and query.until < date.max:
        found = found.where(UsageTotal.id < first_total_id(query.until + timedelta(days=1)))
    if query.model is not None:
        found = found.where(UsageTotal.model_id == query.model)
    if query.key is not None:
        found = found.where(UsageTotal.owner == query.key)
    return found


def _shown(session: Session, rows: Sequence[UsageTotal]) -> list[UsageOut]:
    keys = _names(session, ApiKey, {row.owner for row in rows if row.owner is not None})
    models = _names(session, Model, {row.model_id for row in rows})
    same = ("day", "kind", "network_calls", "network_rows", "device_seconds")
    return [
        UsageOut(
            **{name: getattr(row, name) for name in same},
            key=row.owner,
            key_name=None if row.owner is None else keys.get(row.owner),
            model=row.model_id,
            model_name=models[row.model_id],
        )
        for row in rows
    ]


def _names(session: Session, table: type[ApiKey | Model], ids: set[str]) -> dict[str, str]:
    found = session.execute(select(table.id, table.name).where(table.id.in_(ids)))
    return {row.id: row.name for row in found}
