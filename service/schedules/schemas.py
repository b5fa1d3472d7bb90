"""Requests and responses of the schedules endpoints."""

import json
from typing import Annotated, Any, Literal, Self

from fastapi import Query
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    field_validator,
    model_validator,
)

from service.http.fields import ModelId, Owner, PageQuery, Private, ScheduleId, Search, Time, TuningJobId
from service.registry.tables import ScheduleStatus
from service.schedules.evaluations import EvaluationOut
from service.shared.fields import Eta, ExactNumber, GuidanceScale, Identifier, NumSteps
from service.shared.job_requests import (
    OWN_CLIPPING,
    PRIVATE_SCHEDULE,
    AnySamplerName,
    ClippingText,
    GuidanceTime,
    HeightAndWidth,
    SamplerName,
    SamplingSetting,
    SettingOfIntervals,
)
from service.shared.pipeline_calls import plain_arguments
from timetuner_core.catalog import GuidanceType
from timetuner_core.exports.formats import FORMATS

MAX_DEPTH = 20
MAX_IMAGES = 100
EXAMPLE_GRID, EXAMPLE_RATIOS = [1.0, 0.55, 0.001], [0.98, 0.94]
ALIAS = r"^[a-z][a-z0-9\-]{0,62}$"


def _finite(value: Any) -> Any:
    """Refuse JSON that databases or UTF-8 cannot hold: NaN, half surrogate pairs, deep nesting."""
    if _deeper_than(value, MAX_DEPTH):
        raise ValueError(f"accepted: up to {MAX_DEPTH} levels of nesting")
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value


def _deeper_than(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper_than(part, levels - 1) for part in parts)


def _from_json(value: Any) -> Any:
    """An object that a query gives as its JSON. Raises: ValueError."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError("accepted: a JSON object") from None


FiniteJson = Annotated[Any, AfterValidator(_finite)]


class SolverTable(BaseModel):
    """A learned solver's coefficients: `x_{i+1} = a_i x_i + sum_{j <= i} b_ij x0_j`.

    x_i is what the network is called with, and x0_j the clean sample that it predicted, guided, in call j. A sampler
    that calls the network several times per step has a row for each call.
    """

    model_config = ConfigDict(extra="forbid")

    a: list[FiniteFloat] = Field(examples=[[0.5, 0.0]], description="One per network call.")
    b: list[list[FiniteFloat]] = Field(examples=[[[0.5], [0.1, 0.9]]], description="Row i has i + 1 numbers.")
    times: list[FiniteFloat] | None = Field(
        None,
        examples=[None],
        description="The time of each network call, where the sampler has several per step; each is told its step's "
        "t_ratio times that. Null: the grid's times.",
    )
    eps: list[FiniteFloat] | None = Field(
        None,
        examples=[None],
        description="The factor in x_{i+1} of the noise that the network predicted in call i, where a sampler clips "
        "x0 and keeps it, as DDIM does. Null: the noise follows x0.",
    )


class ScheduleOut(BaseModel):
    """A tuned schedule: everything a few-step sampler needs beside the network."""

    model_config = ConfigDict(from_attributes=True)

    id: ScheduleId
    owner: Owner
    private: Private
    job: TuningJobId | None = Field(validation_alias="job_id")
    model: ModelId = Field(validation_alias="model_id")
    sampler: str = Field(examples=["ddim"])
    num_steps: int = Field(examples=[2])
    clipping: Annotated[str | None, BeforeValidator(lambda text: None if text == OWN_CLIPPING else text)] = Field(
        examples=[None], description="How x0 is clipped; null: as the model's own scheduler does."
    )
    guidance_type: GuidanceType
    guidance_scale: ExactNumber = Field(examples=[1.0])
    guidance_scales: list[ExactNumber] | None = Field(
        None,
        examples=[None],
        description="The lowest and the highest guidance scale of a schedule that serves all between; then "
        "`guidance_scale` is the lowest. Null: it is for one scale.",
    )
    guidance_rescale: ExactNumber
    guidance_start: ExactNumber
    guidance_end: ExactNumber = Field(examples=[1000.0])
    eta: ExactNumber
    version: int
    status: ScheduleStatus = Field(
        description="Rejected: not better than untuned beyond chance, or worse in some respect; the evaluation's "
        "`verdict` tells the two apart. Imported: not evaluated. `auto` skips both."
    )
    score: float | None = Field(
        examples=[0.73], description="The metric that decides, tuned over untuned; below 1 is better."
    )
    timesteps: list[float] = Field(examples=[EXAMPLE_GRID], description="num_steps + 1 falling times in [0, T].")
    t_ratios: list[float] = Field(
        examples=[EXAMPLE_RATIOS], description="One per step: the network is conditioned on t * t_ratio."
    )
    solver_table: SolverTable | None = Field(
        None,
        description="The learned solver that takes the steps in place of the sampler's own formula; null: the latter.",
    )
    call: dict[str, Any] | None = Field(
        None,
        examples=[None],
        description="The arguments of a pipeline's call that it is for, sizes among them; null: a network's schedule.",
    )
    provenance: dict[str, Any] = Field(
        examples=[{"tuner": {"objective": "end_to_end"}}], description="How it was tuned."
    )
    evaluation: EvaluationOut | None
    created_at: Time

    @model_validator(mode="after")
    def _summarise(self) -> Self:
        if self.evaluation is not None:
            self.evaluation.summary = self.evaluation.summarised(self.num_steps)
        return self


class ScheduleImport(SettingOfIntervals):
    """A schedule made elsewhere, or exported by another registry."""

    timesteps: list[FiniteFloat] = Field(
        examples=[EXAMPLE_GRID], description="num_steps + 1 strictly falling times in [0, T]."
    )
    t_ratios: list[FiniteFloat] = Field(
        examples=[EXAMPLE_RATIOS], description="One per step; t * t_ratio stays within (0, T]."
    )
    solver_table: SolverTable | None = Field(
        None, examples=[None], description="A learned solver, for samplers without noise."
    )
    image_sizes: list[HeightAndWidth] | None = Field(
        None,
        min_length=1,
        max_length=MAX_IMAGES,
        examples=[None],
        description="In place of images in `call` that decide the size of a pipeline's result: [width, height] of "
        "each, as an export has them.",
    )
    provenance: dict[str, FiniteJson] = Field(
        examples=[{"made_by": "another registry"}], default_factory=dict, description="How it was made."
    )
    private: bool = PRIVATE_SCHEDULE
    model_content_hash: Identifier | None = Field(
        None,
        examples=[None],
        description="The content hash of the model that it was made for, as an export has it. If the model's own is "
        "another, the schedule is refused.",
    )
    override: bool = Field(False, description="Take the schedule for a model with another content hash all the same.")

    def deciding(self) -> dict[str, Any]:
        """The arguments of a setting, with the sizes of images that an export cannot have."""
        return super().deciding() | ({} if self.image_sizes is None else {"image_sizes": self.image_sizes})

    @field_validator("call", mode="before")
    @classmethod
    def _none_is_empty(cls, call: Any) -> Any:
        """A schedule as `GET` gives it has null, where its model is a network."""
        return {} if call is None else call


class SchedulePage(BaseModel):
    items: list[ScheduleOut]
    next_cursor: str | None = Field(
        examples=[None],
        description="Null on the last page. Where few schedules match, pages before it may have fewer than `limit` "
        "items, or none: each looks at so many schedules only.",
    )


class ScheduleQuery(PageQuery):
    """Filters, each of which is optional and, but for `search`, exact; and the order."""

    model_config = ConfigDict(extra="forbid")

    model: Identifier | None = None
    sampler: SamplerName | None = None
    clipping: ClippingText | Literal["own"] | None = Field(
        None, description="`own`: schedules for the clipping of the model's own scheduler."
    )
    num_steps: NumSteps | None = None
    guidance_type: GuidanceType | None = None
    guidance_scale: GuidanceScale | None = Field(None, description="Of an interval, the lowest.")
    guidance_rescale: Eta | None = None
    guidance_start: GuidanceTime | None = None
    guidance_end: GuidanceTime | None = None
    eta: Eta | None = None
    status: ScheduleStatus | None = None
    search: Search = Field(None, description="A part of the id, of an alias or of the model's name, in any case.")
    sort: Literal["newest", "score"] = Field(
        "newest", description="The order. `score`: the best first; imported schedules have none, and are left out."
    )


class Resolution(BaseModel):
    """The schedule that `schedule: "auto"` samples with, and why. A null schedule means untuned."""

    schedule: ScheduleOut | None
    reason: str = Field(examples=["the best score of the accepted schedules of this setting"])


class AliasRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schedule: Identifier = Field(
        examples=["sch_01JD3K5V8Q2M4N6P7R9S0T1V2W"], description="The id of a schedule of this model."
    )


class AliasOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    model: ModelId = Field(validation_alias="model_id")
    name: str = Field(examples=["production"])
    schedule: ScheduleId = Field(validation_alias="schedule_id")


class AliasList(BaseModel):
    items: list[AliasOut]


class ExportQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[tuple(FORMATS)] = Field("json", description="What to export the schedule as.")  # type: ignore[valid-type]
    lossy: bool = Field(
        False, description="Export the time grid although the format has no place for ratios or a learned solver."
    )


ExportOptions = Annotated[ExportQuery, Query()]
ScheduleFilters = Annotated[ScheduleQuery, Query()]


class ResolveQuery(SamplingSetting):
    """A setting as a query."""

    sampler: AnySamplerName = "ddim"
    call: Annotated[dict[str, Any], AfterValidator(plain_arguments), BeforeValidator(_from_json)] = Field(
        {}, description="For pipelines: further arguments of the call, as JSON."
    )


ResolveParams = Annotated[ResolveQuery, Query()]
