"""Requests and responses of the tuning group endpoints."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from service.http.fields import TuningGroupId
from service.shared.job_requests import TUNING_EXAMPLE, TuningJobRequest
from service.tuning_jobs.schemas import TuningJobOut

MAX_JOBS = 50


class TuningGroupRequest(BaseModel):
    """Several tuning jobs, for other numbers of steps or by other tuners, say. All are queued, or none is."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"jobs": [TUNING_EXAMPLE, TUNING_EXAMPLE | {"num_steps": 6}]}]}
    )

    jobs: Annotated[list[TuningJobRequest], Field(min_length=1, max_length=MAX_JOBS)]
    dry_run: bool = Field(False, description="Check and price the jobs, and queue none.")


class TuningGroupOut(BaseModel):
    """Tuning jobs that were submitted together."""

    model_config = ConfigDict(from_attributes=True)

    id: TuningGroupId | None = Field(description="Null for a dry run.")
    cost: int | None = Field(
        examples=[1_000_000],
        description="The samples that all jobs put through the network, at most. Null once they are submitted.",
    )
    seconds: float | None = Field(
        examples=[120.0],
        description="The time that this cost takes one worker, at most, by the pace of your earlier jobs on the same "
        "models. Null where there is none, and once the jobs are submitted.",
    )
    progress: float = Field(description="0 to 1, the mean of the jobs'.")
    is_over: bool = Field(description="Whether every job has succeeded, failed or been cancelled.")
    jobs: list[TuningJobOut] = Field(description="In the order of the request; none for a dry run.")
