"""Responses of the audit log's endpoint."""

from pydantic import BaseModel, ConfigDict, Field

from service.http.fields import KeyId, NextCursor, RequestId, Time, TuningJobId


class AuditEntryOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str = Field(examples=["aud_01JD3K5V8Q2M4N6P7R9S0T1V2W"])
    actor: KeyId = Field(description="The id of an API key; or `cli`, the `timetuner` command.")
    action: str = Field(
        examples=["cancel_tuning_job"],
        description="The operation's id, such as `cancel_tuning_job`; or what the command did.",
    )
    object: TuningJobId = Field(
        description="The id of the object; the model's id and the name of an alias; the path of a refused request."
    )
    outcome: str = Field(examples=["done"], description="`done`, or `refused: ` and the status.")
    request_id: RequestId | None = Field(description="The request's X-Request-Id.")
    created_at: Time


class AuditPage(BaseModel):
    items: list[AuditEntryOut]
    next_cursor: NextCursor
