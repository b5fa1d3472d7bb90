"""What the tuning job endpoints accept and return."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from service.api import Seed
from service.registry.tables import JobState
from service.requests import Setting, Timesteps
from timetuner_core.tuning import TuneType


class Tuner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    batch_size: int = Field(16, ge=1, le=1024, description="Samples per iteration (and per step, if per step).")


class EndToEndTuner(Tuner):
    """All ratios together, so that the sampler's result matches a many-step teacher's. Needs no data."""

    objective: Literal["end_to_end"] = "end_to_end"
    lr: float = Field(1e-2, gt=0, le=1, description="Adam's learning rate, falling to 0.")
    total_iters: int = Field(100, ge=1, le=10_000)
    population_size: int = Field(256, ge=1, le=65_536, description="Initial noises to tune on.")
    teacher_num_steps: int = Field(50, ge=1, le=1000)


class NextEpsTuner(Tuner):
    """The published procedure, step by step; the last step keeps ratio 1."""

    objective: Literal["next_eps"]
    tune_type: TuneType = "parallel"
    lr: float = Field(2e-3, gt=0, le=1, description="Adam's learning rate.")
    total_iters: int = Field(500, ge=1, le=10_000, description="Per step.")
    population_size: int = Field(1024, ge=1, le=65_536, description="Data to draw from.")
    data: Literal["auto", "model", "generated"] = Field(
        "auto", description="The data that came with the model, or the teacher's samples; auto: the former if any."
    )
    teacher_num_steps: int = Field(50, ge=1, le=1000, description="Of the teacher that generates data, if any.")


def _objective(value: Any) -> str:
    """Which tuner is meant; the default if none is named."""
    given = value.get("objective", "end_to_end") if isinstance(value, dict) else getattr(value, "objective", None)
    return str(given)


AnyTuner = Annotated[
    Annotated[EndToEndTuner, Tag("end_to_end")] | Annotated[NextEpsTuner, Tag("next_eps")], Discriminator(_objective)
]


class EvaluationRequest(BaseModel):
    """How the result is compared with the untuned sampler before it is stored."""

    model_config = ConfigDict(extra="forbid")

    num_samples: int = Field(512, ge=16, le=50_000)
    teacher_num_steps: int = Field(100, ge=1, le=1000)
    batch_size: int = Field(64, ge=1, le=1024)


class TuningJobRequest(Setting):
    """Tune one schedule."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "model": "mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W",
                "num_steps": 10,
                "guidance_type": "classifier-free",
                "guidance_scale": 2.0,
            }
        },
    )

    timesteps: Timesteps = Field("default", description="The grid to tune on: a name, or num_steps + 1 times.")
    tuner: AnyTuner = Field(default_factory=EndToEndTuner)
    evaluation: EvaluationRequest = Field(default_factory=EvaluationRequest)
    seed: Seed = 0


class StepOut(BaseModel):
    """Where tuning stands for one step of the sampler."""

    model_config = ConfigDict(from_attributes=True)

    step_index: int
    t_ratio: float
    iterations: int
    loss: float | None
    initial_loss: float | None


class TuningJobOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    model: str = Field(validation_alias="model_id")
    state: JobState
    progress: float = Field(description="0 to 1.")
    attempt: int = Field(description="How many workers have started it.")
    error: str | None
    cancel_requested: bool
    request: dict[str, Any]
    schedule: str | None = Field(validation_alias="schedule_id", description="The schedule it made.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class TuningJobDetail(TuningJobOut):
    steps: list[StepOut]


class TuningJobPage(BaseModel):
    items: list[TuningJobOut]
    next_cursor: str | None


class EventOut(BaseModel):
    """`queued`, `started`, `progress`, `cancel_requested`, `requeued`, or a final state."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    type: str
    data: dict[str, Any]
    created_at: datetime


class EventPage(BaseModel):
    items: list[EventOut]
