"""Column types that mean the same on SQLite and PostgreSQL, and identifiers."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import BigInteger, DateTime, Dialect, Float, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator
from ulid import ULID


def new_id(prefix: str) -> str:
    """A prefixed identifier that sorts by time of creation, such as `job_01J…`."""
    return f"{prefix}_{ULID()}"


def first_id(prefix: str, time: datetime) -> str:
    """An identifier that sorts before all that are made at `time` or later."""
    return f"{prefix}_{ULID.from_datetime(time)!s:.10}"


def utc_now() -> datetime:
    return datetime.now(UTC)


class ExactDecimal(TypeDecorator[Decimal]):
    """A decimal of at most six places, stored as an integer of millionths: equality is exact on every engine."""

    impl = BigInteger
    cache_ok = True
    SCALE = 1_000_000

    def process_bind_param(self, value: Any, dialect: Dialect) -> int | None:
        if value is None:
            return None
        millionths = Decimal(str(value)) * self.SCALE
        if millionths != int(millionths):
            raise ValueError(f"{value} has more than six decimal places")
        return int(millionths)

    def process_result_value(self, value: int | None, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value) / self.SCALE


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time, always aware and in UTC. SQLite stores no zone, and PostgreSQL gives its server's."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class FromNow(FunctionElement[datetime]):
    """The time `seconds` from now by the database's clock. Clocks of other machines do not matter."""

    type = UtcDateTime()
    inherit_cache = True

    def __init__(self, seconds: Any = 0.0) -> None:
        super().__init__(literal(seconds, Float) if isinstance(seconds, int | float) else seconds)


@compiles(FromNow, "postgresql")
def _from_now_postgresql(element: FromNow, compiler: Any, **options: Any) -> str:
    return f"(statement_timestamp() + make_interval(secs => {compiler.process(element.clauses, **options)}))"


@compiles(FromNow, "sqlite")
def _from_now_sqlite(element: FromNow, compiler: Any, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    # SQLite stores `UtcDateTime` in this format.
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', ({seconds}) || ' seconds')"
