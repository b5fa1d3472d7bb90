"""Responses of the tuning job endpoints."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.http.fields import (
    Fault,
    KeyId,
    ModelId,
    NextCursor,
    RequestId,
    ScheduleId,
    Time,
    TuningGroupId,
    TuningJobId,
)
from service.registry.tables import JobState
from service.shared.job_requests import TUNING_EXAMPLE


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
    group: TuningGroupId | None = Field(
        None, validation_alias="group_id", examples=[None], description="The group that it was submitted with."
    )
    state: JobState
    progress: float = Field(description="0 to 1.")
    attempt: int = Field(description="The number of times that a worker has started the job.")
    error: Fault
    request_id: RequestId | None = Field(description="The id of the HTTP request that made the job: see X-Request-Id.")
    cancel_requested: bool
    request: dict[str, Any] = Field(examples=[TUNING_EXAMPLE])
    schedule: ScheduleId | None = Field(validation_alias="schedule_id", description="The schedule it made.")
    created_at: Time
    started_at: Time | None
    finished_at: Time | None


class PhaseOut(BaseModel):
    """A part of a job, counted in network calls."""

    name: Literal["teacher", "start", "tuning", "evaluation"]
    done: int
    total: int = Field(description="An estimate. Tuning may need fewer.")


class TuningJobProgress(BaseModel):
    """How far a job is, and how long it takes."""

    phase: Literal["teacher", "start", "tuning", "evaluation"] | None = Field(
        None,
        examples=["tuning"],
        description="What is going on: a teacher samples, grids to start from are tried, ratios are tuned, or the "
        "result is evaluated. Null before the first network call.",
    )
    phases: list[PhaseOut] = Field([], description="All phases of the latest attempt, in order.")
    elapsed_seconds: float | None = Field(
        None, examples=[12.5], description="The time from the job's start until now, or until its end."
    )
    remaining_seconds: float | None = Field(
        None, examples=[30.0], description="An estimate, while the job runs; null before there is one."
    )


class TuningJobDetail(TuningJobProgress, TuningJobOut):
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
