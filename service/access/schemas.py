"""What the audit log returns."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field


class AuditEntryOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    actor: str = Field(description="The id of an API key; or `cli`, the `timetuner` command.")
    action: str = Field(description="The operation's id, such as `cancel_tuning_job`; or what the command did.")
    object: str = Field(
        description="What it was done to: an id, of an alias its model's and its name; the path if refused."
    )
    outcome: str = Field(description="`done`, or `refused: ` and the status.")
    request_id: str | None = Field(description="The request's X-Request-Id.")
    created_at: datetime


class AuditPage(BaseModel):
    items: list[AuditEntryOut]
    next_cursor: str | None
