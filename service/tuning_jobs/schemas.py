"""Responses of the tuning job endpoints."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from service.http.fields import Fault, KeyId, ModelId, NextCursor, RequestId, ScheduleId, Time, TuningJobId
from service.registry.tables import JobState
from service.shared.tuning_request import EXAMPLE


class StepOut(BaseModel):
    """The state of tuning one step of the sampler."""

    model_config = ConfigDict(from_attributes=True)

    step_index: int
    t_ratio: float
    iterations: int
    loss: float | None
    initial_loss: float | None
    done: bool


class TuningJobOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: TuningJobId
    owner: KeyId | None = Field(description="The API key that asked, or null if none was needed.")
    model: ModelId = Field(validation_alias="model_id")
    state: JobState
    progress: float = Field(description="0 to 1.")
    attempt: int = Field(description="The number of times that a worker has started the job.")
    error: Fault
    request_id: RequestId | None = Field(description="The id of the HTTP request that made the job: see X-Request-Id.")
    cancel_requested: bool
    request: dict[str, Any] = Field(examples=[EXAMPLE])
    schedule: ScheduleId | None = Field(validation_alias="schedule_id", description="The schedule it made.")
    created_at: Time
    started_at: Time | None
    finished_at: Time | None


class TuningJobDetail(TuningJobOut):
    timesteps: list[float] | None = Field(
        examples=[[1.0, 0.55, 0.001]], description="The grid so far, of num_steps + 1 times; null before the first."
    )
    steps: list[StepOut]


class TuningJobPage(BaseModel):
    items: list[TuningJobOut]
    next_cursor: NextCursor


class EventOut(BaseModel):
    """`queued`, `started`, `progress`, `cancel_requested`, `requeued`, or a final state."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    type: str = Field(examples=["progress"])
    data: dict[str, Any] = Field(examples=[{"progress": 0.5}])
    created_at: Time


class EventPage(BaseModel):
    items: list[EventOut]
