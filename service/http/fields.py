"""Building blocks of endpoints: JSON bodies, pages of lists, common field types."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, TypeVar

from fastapi import Path, Query, Request
from pydantic import BaseModel, Field
from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.http.errors import EXAMPLE_REQUEST_ID, InvalidError, UnsupportedMediaTypeError
from service.registry.tables import AuditEntry, Model, ModelRegistration, SampleJob, TuningJob, UsageTotal
from service.shared.fields import IDENTIFIER, PRINTABLE, Identifier

JSON_TYPE = "application/json"
PathId = Annotated[str, Path(**IDENTIFIER)]

# These field types of responses have examples for the OpenAPI document.
ModelId = Annotated[str, Field(examples=["mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W"])]
TuningJobId = Annotated[str, Field(examples=["job_01JD3K5V8Q2M4N6P7R9S0T1V2W"])]
TuningGroupId = Annotated[str, Field(examples=["grp_01JD3K5V8Q2M4N6P7R9S0T1V2W"])]
ScheduleId = Annotated[str, Field(examples=["sch_01JD3K5V8Q2M4N6P7R9S0T1V2W"])]
SampleJobId = Annotated[str, Field(examples=["smp_01JD3K5V8Q2M4N6P7R9S0T1V2W"])]
KeyId = Annotated[str, Field(examples=["key_01JD3K5V8Q2M4N6P7R9S0T1V2W"])]
Owner = Annotated[
    KeyId | None, Field(description="The API key that made it; null if none was needed, or an older version made it.")
]
Private = Annotated[bool, Field(description="Whether only its owner, and admins, see it.")]
RequestId = Annotated[str, Field(examples=[EXAMPLE_REQUEST_ID])]
Fault = Annotated[str | None, Field(examples=[None])]
Time = Annotated[datetime, Field(examples=["2026-11-26T03:00:00Z"])]
NextCursor = Annotated[str | None, Field(examples=[None], description="The cursor of the next page; null on the last.")]


async def require_json(request: Request) -> None:
    """A dependency of endpoints with a JSON body: 415 for anything else, 422 for fields that come twice."""
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != JSON_TYPE:
        raise UnsupportedMediaTypeError(
            f"Content-Type is {given!r}; accepted: {JSON_TYPE}", ("header", "Content-Type"), given
        )
    check_fields(await request.body())


def check_fields(body: bytes) -> None:
    """Refuse JSON that gives a field of an object twice, because it is ambiguous. Text that is no JSON is let through.

    Raises: InvalidError.
    """

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            name, count = Counter(name for name, _ in pairs).most_common(1)[0]
            raise InvalidError(
                f"{name[:100]!r} is given {count} times; accepted: each field once", ("body", name[:100])
            )
        return fields

    try:
        with suppress(ValueError):
            json.loads(body, object_pairs_hook=check)
    except RecursionError:
        raise InvalidError("JSON nested so deep cannot be read; accepted: a few levels", ("body",)) from None


class PageQuery(BaseModel):
    limit: int = Field(50, ge=1, le=200, description="The largest number of items.")
    cursor: Identifier | None = Field(None, description="The `next_cursor` of the page before.")


Search = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=200,
        pattern=PRINTABLE,
        description="A part of the name or id, without regard to case.",
    ),
]
PageParams = Annotated[PageQuery, Query()]
Row = TypeVar("Row", AuditEntry, Model, ModelRegistration, SampleJob, TuningJob, UsageTotal)


def newest_first(
    session: Session, query: Select[Row], id_column: InstrumentedAttribute[str], page: PageQuery
) -> tuple[Sequence[Row], str | None]:
    """One page of rows by falling id, and the cursor of the next, or None after the last."""
    if page.cursor is not None:
        query = query.where(id_column < page.cursor)
    rows = session.scalars(query.order_by(id_column.desc()).limit(page.limit + 1)).all()
    more = len(rows) > page.limit
    rows = rows[: page.limit]
    return rows, rows[-1].id if more else None
