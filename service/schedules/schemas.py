"""What the schedules endpoints accept and return."""

import json
from datetime import datetime
from typing import Annotated, Any

from fastapi import Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat

from service.api import Eta, ExactNumber, GuidanceScale, Identifier, NumSteps, PageQuery
from service.registry.tables import ScheduleStatus
from service.requests import GuidanceTime, Sampler, Setting
from timetuner_core.model_wrapper import GuidanceType

MAX_DEPTH = 20
ALIAS = r"^[a-z][a-z0-9\-]{0,62}$"


def _finite(value: Any) -> Any:
    """Refuse what Python reads but no database keeps or UTF-8 writes: NaN, half surrogate pairs, endless nesting."""
    if _deeper_than(value, MAX_DEPTH):
        raise ValueError(f"accepted: up to {MAX_DEPTH} levels of nesting")
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value


def _deeper_than(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper_than(part, levels - 1) for part in parts)


FiniteJson = Annotated[Any, AfterValidator(_finite)]


class MetricOut(BaseModel):
    """One figure, the better the lower, untuned and tuned; null where it is not finite."""

    before: float | None
    after: float | None
    change: float | None = Field(description="after - before.")
    low: float | None = Field(description="95 % bootstrap interval of the change.")
    high: float | None


class EvaluationOut(BaseModel):
    """Tuned against untuned, from the same held-out noise."""

    model_config = ConfigDict(from_attributes=True)

    num_samples: int
    teacher_num_steps: int
    seed: int
    teacher_l2_before: float = Field(description="Mean Euclidean distance to the teacher's samples, untuned.")
    teacher_l2_after: float
    teacher_l2_change_low: float = Field(description="95 % confidence interval of the paired change.")
    teacher_l2_change_high: float
    frechet_before: float | None = Field(description="Fréchet distance to the data, untuned, in pixel space.")
    frechet_after: float | None
    metrics: dict[str, MetricOut] = Field(
        description="By name: `teacher_l2`, `sliced_wasserstein` and, where they could be measured, `frechet`, "
        "`frechet_features` (of a classifier that came with the model), `wasserstein` and `kl` (of mixtures, exact)."
    )
    reason: str | None = Field(description="Why the schedule was accepted or rejected.")
    wall_time_seconds: float = Field(description="Of tuning, summed over workers; evaluation not counted.")
    network_calls: int = Field(description="Samples put through the network while tuning, guidance counted.")


class ScheduleOut(BaseModel):
    """A tuned schedule: everything a few-step sampler needs beside the network."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    job: str | None = Field(validation_alias="job_id")
    model: str = Field(validation_alias="model_id")
    sampler: str
    num_steps: int
    guidance_type: GuidanceType
    guidance_scale: ExactNumber
    guidance_rescale: ExactNumber
    guidance_start: ExactNumber
    guidance_end: ExactNumber
    eta: ExactNumber
    version: int
    status: ScheduleStatus = Field(
        description="Rejected: not better than untuned beyond chance, or worse in some respect; imported: not "
        "evaluated. `auto` skips both."
    )
    score: float | None = Field(description="The metric that decides, tuned over untuned; below 1 is better.")
    timesteps: list[float] = Field(description="num_steps + 1 falling times in [0, T].")
    t_ratios: list[float] = Field(description="One per step: the network is conditioned on t * t_ratio.")
    provenance: dict[str, Any] = Field(description="How it was tuned.")
    evaluation: EvaluationOut | None
    created_at: datetime


class ScheduleImport(Setting):
    """A schedule made elsewhere, or exported by another registry."""

    timesteps: list[FiniteFloat] = Field(description="num_steps + 1 strictly falling times in [0, T].")
    t_ratios: list[FiniteFloat] = Field(description="One per step; t * t_ratio stays within (0, T].")
    provenance: dict[str, FiniteJson] = Field(default_factory=dict, description="How it was made.")


class SchedulePage(BaseModel):
    items: list[ScheduleOut]
    next_cursor: str | None = Field(
        description="Null on the last page. Where few schedules match, pages before it may have fewer than `limit` "
        "items, or none: each looks at so many schedules only."
    )


class ScheduleQuery(PageQuery):
    """Filters; each is optional and exact."""

    model_config = ConfigDict(extra="forbid")

    model: Identifier | None = None
    sampler: Sampler | None = None
    num_steps: NumSteps | None = None
    guidance_type: GuidanceType | None = None
    guidance_scale: GuidanceScale | None = None
    guidance_rescale: Eta | None = None
    guidance_start: GuidanceTime | None = None
    guidance_end: GuidanceTime | None = None
    eta: Eta | None = None
    status: ScheduleStatus | None = None


class Resolution(BaseModel):
    """What `schedule: "auto"` samples with, and why; a null schedule means untuned."""

    schedule: ScheduleOut | None
    reason: str


class AliasRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schedule: Identifier = Field(description="The id of a schedule of this model.")


class AliasOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    model: str = Field(validation_alias="model_id")
    name: str
    schedule: str = Field(validation_alias="schedule_id")


class AliasList(BaseModel):
    items: list[AliasOut]


ScheduleFilters = Annotated[ScheduleQuery, Query()]
ResolveParams = Annotated[Setting, Query()]
