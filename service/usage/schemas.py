"""Requests and responses of the usage endpoint."""

from datetime import date
from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from service.http.fields import KeyId, ModelId, NextCursor, PageQuery
from service.registry.tables import UsageKind
from service.shared.fields import Identifier


class UsageQuery(PageQuery):
    """Filters; each is optional."""

    model_config = ConfigDict(extra="forbid")

    since: date | None = Field(None, description="The first day, in UTC.")
    until: date | None = Field(None, description="The last day, in UTC.")
    model: Identifier | None = None
    key: Identifier | None = Field(None, description="The id of an API key.")


class UsageOut(BaseModel):
    """The use of one model by the jobs of one API key that ended on one day."""

    day: date = Field(examples=["2026-11-26"], description="The day on which the jobs ended, in UTC.")
    key: KeyId | None = Field(description="The API key that asked, or null if none was needed.")
    key_name: str | None = Field(examples=["ann"])
    model: ModelId
    model_name: str = Field(examples=["digits8"], description="Also of a model that was deleted.")
    kind: UsageKind
    network_calls: float = Field(
        examples=[1200.0], description="Calls of the network. Jobs that share a call have equal shares for each image."
    )
    network_rows: float = Field(examples=[19200.0], description="Samples put through the network.")
    device_seconds: float = Field(examples=[42.5], description="The time of workers, each of which has one device.")


class UsagePage(BaseModel):
    items: list[UsageOut]
    next_cursor: NextCursor


UsageFilters = Annotated[UsageQuery, Query()]
