"""Responses of the sampling endpoints."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, computed_field

from service.http.fields import Fault, KeyId, ModelId, NextCursor, RequestId, SampleJobId, ScheduleId, Time
from service.registry.tables import JobState
from service.shared.job_requests import SampleRequest


class SampleJobOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: SampleJobId
    owner: KeyId | None = Field(description="The API key that asked, or null if none was needed.")
    model: ModelId = Field(validation_alias="model_id")
    state: JobState
    progress: float
    error: Fault
    request_id: RequestId | None = Field(description="The id of the HTTP request that made the job: see X-Request-Id.")
    schedule: ScheduleId | None = Field(validation_alias="schedule_id", description="The schedule used; null: untuned.")
    flagged: list[int] | None = Field(
        None,
        examples=[None],
        description="The numbers of the images that the pipeline's safety checker held back; null without a checker.",
    )
    dtype: str | None = Field(
        None,
        examples=["float32"],
        description="The precision that the network runs in: that in which the schedule was accepted, else float32. "
        "Null: a pipeline, which has its own, or a job of an older version.",
    )
    request: Annotated[SampleRequest, BeforeValidator(SampleRequest.stored)]
    created_at: Time
    started_at: Time | None
    finished_at: Time | None

    @computed_field(  # type: ignore[prop-decorator]
        examples=["/v1/samples/smp_01JD3K5V8Q2M4N6P7R9S0T1V2W/content"],
        description="The path of the images, once the job has succeeded.",
    )
    @property
    def content(self) -> str | None:
        return f"/v1/samples/{self.id}/content" if self.state == JobState.SUCCEEDED else None


class SampleJobPage(BaseModel):
    items: list[SampleJobOut]
    next_cursor: NextCursor
