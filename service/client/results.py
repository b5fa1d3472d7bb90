"""Types of responses. Fields that a newer service adds are ignored."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field, field_validator

from service.client import display
from service.client.choices import GuidanceType, JobState, ModelState, Phase, ScheduleStatus
from service.client.errors import JobFailedError, NoScheduleError, NotReadyError
from service.client.problems import Problem, error_of
from service.client.requests import ScheduleImport
from service.shared.image_formats import to_images, to_png_grid
from service.shared.pipeline_calls import SIZES, sizes_of_import

if TYPE_CHECKING:
    from timetuner_core.integrations.diffusers import TimeTunerScheduler

T = TypeVar("T")


class CallArgument(BaseModel):
    """An argument of a pipeline's call that a request may give."""

    type: Literal["text", "integer", "number", "boolean", "image", "images", "integers", "numbers", "texts"]
    default: Any = None
    required: bool


class Licence(BaseModel):
    name: str | None
    source: str | None


class ModelSpec(BaseModel):
    """The properties of a model that requests depend on."""

    sample_shape: list[int]
    image_shape: list[int]
    model_type: Literal["noise", "x_start", "v", "score", "flow", "edm"]
    T: float
    num_train_timesteps: int | None
    num_classes: int
    null_class_label: int | None
    condition_shape: list[int | None] | None
    guidance_types: list[GuidanceType]
    num_parameters: int
    has_uncond_condition: bool
    has_conditions: bool
    has_data: bool
    clipping: str | None = None
    t_start: float | None = None
    x0_error_at_start: float | None = None
    kind: Literal["network", "pipeline"] = "network"
    pipeline: str | None = None
    scheduler: str | None = None
    dtype: str | None = None
    call: dict[str, CallArgument] | None = None
    output: Literal["images", "frames"] | None = None
    size_multiple: int | None = None
    tunable: str | None = None
    flags_content: bool = False
    licence: Licence | None = None
    num_bytes: int | None = None


class Model(BaseModel):
    """A registered model. Notebooks show its facts as a table."""

    id: str
    name: str
    content_hash: str
    state: Literal["ready"] = "ready"
    owner: str | None = None
    private: bool = False
    ignored_files: list[str] = Field(default_factory=list)
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    spec: ModelSpec
    created_at: datetime

    def _repr_html_(self) -> str:
        return display.model_html(self)


class ModelRegistrationFields(BaseModel):
    """A model that was handed in. It has a `spec` once it is ready, and a `problem` if it was refused."""

    id: str
    name: str
    content_hash: str
    state: ModelState = "ready"
    owner: str | None = None
    private: bool = False
    ignored_files: list[str] = Field(default_factory=list)
    problem: Problem | None = None
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    spec: ModelSpec | None = None
    created_at: datetime

    @property
    def is_over(self) -> bool:
        return self.state in ("ready", "refused")

    def model(self) -> Model:
        """The model, if it is ready.

        Raises:
            ApiError: it was refused; the error is that of a request which waits for its model.
            NotReadyError: no worker has described it yet.
        """
        if self.problem is not None:
            raise error_of(self.problem)
        if self.spec is None:
            raise NotReadyError(f"model {self.id} is {self.state}: no worker has described it yet")
        return Model.model_validate(self.model_dump(include=set(Model.model_fields)))


class Metric(BaseModel):
    """One figure, the better the lower, untuned and tuned; `low` to `high` is the change's 95 % interval.

    `stock` is that of the time grid that diffusers takes by default, and `teacher` that of the teacher's samples; None
    if they were not measured.
    """

    before: float | None
    after: float | None
    change: float | None
    low: float | None
    high: float | None
    stock: float | None = None
    teacher: float | None = None


class Untuned(BaseModel):
    """The untuned sampler with some number of steps."""

    num_steps: int
    teacher_l2: float


class Worth(BaseModel):
    """How many steps the untuned sampler takes to come as near to the teacher.

    `num_steps` is None if the schedule comes nearer than all that were measured (`is_beyond`), or than none.
    """

    num_steps: float | None
    is_beyond: bool
    grid: str
    teacher_l2: float
    num_samples: int
    untuned: list[Untuned]


class BestUntuned(BaseModel):
    """The best untuned choice that was measured, with as many network calls; `change` is the schedule's minus that."""

    sampler: str
    grid: str
    teacher_l2: float | None
    change: float | None
    low: float | None
    high: float | None


class ScaleEvaluation(BaseModel):
    """The findings at one guidance scale, of a schedule for an interval of them."""

    guidance_scale: float
    verdict: Literal["accepted", "rejected", "undecided"]
    reason: str
    score: float | None
    num_samples: int
    metrics: dict[str, Metric]
    worth: Worth | None = None
    best_untuned: BestUntuned | None = None


class Evaluation(BaseModel):
    """Tuned against untuned, from the same held-out noise. Notebooks show it as a table, or as a picture.

    Of a schedule for an interval of guidance scales, the figures are those of the scale that decides, `guidance_scale`.
    `at_scales` has them all.
    """

    num_samples: int
    teacher_num_steps: int
    seed: int
    teacher_l2_before: float
    teacher_l2_after: float
    teacher_l2_change_low: float
    teacher_l2_change_high: float
    frechet_before: float | None
    frechet_after: float | None
    metrics: dict[str, Metric]
    verdict: Literal["accepted", "rejected", "undecided"] | None = None
    reason: str | None
    worth: Worth | None = None
    best_untuned: BestUntuned | None = None
    guidance_scale: float | None = None
    at_scales: list[ScaleEvaluation] | None = None
    summary: str | None = None
    wall_time_seconds: float
    network_calls: int

    def _repr_html_(self) -> str:
        return display.evaluation_html(self)

    def _repr_png_(self) -> bytes | None:
        return display.evaluation_png(self) if display.can_draw() else None


class Schedule(BaseModel):
    """A time grid with a ratio per step. Notebooks show it as a table with a picture.

    Of a schedule for an interval of guidance scales, `guidance_scale` is the lowest.
    """

    id: str
    owner: str | None = None
    private: bool = False
    job: str | None
    model: str
    sampler: str
    num_steps: int
    clipping: str | None = None
    guidance_type: GuidanceType
    guidance_scale: float
    guidance_scales: list[float] | None = None
    guidance_rescale: float
    guidance_start: float
    guidance_end: float
    eta: float
    version: int
    status: ScheduleStatus
    score: float | None
    timesteps: list[float]
    t_ratios: list[float]
    solver_table: dict[str, Any] | None = None
    call: dict[str, Any] | None = None
    provenance: dict[str, Any]
    evaluation: Evaluation | None
    created_at: datetime

    def to_diffusers(self, pipeline: Any) -> "TimeTunerScheduler":
        """A scheduler for a diffusers pipeline, to take its own's place: `pipeline.scheduler = …`.

        Raises:
            ValueError: a sampler that calls the network several times per step.
        """
        from timetuner_core.integrations.diffusers import TimeTunerScheduler

        scheduler: TimeTunerScheduler = TimeTunerScheduler.from_schedule(pipeline.scheduler, self.model_dump())
        return scheduler

    def to_import(self) -> ScheduleImport:
        """The fields that import this schedule elsewhere: `client.schedules.import_(**schedule.to_import())`.

        Whether it is private there is for the one who imports it to say.
        """
        theirs = {"private", "override", "model_content_hash", "height", "width", "sizes", "image_sizes", "call"}
        names = set(ScheduleImport.__annotations__) - theirs
        kept: ScheduleImport = self.model_dump(mode="json", include=names)  # type: ignore[assignment]
        if self.call is not None:
            call = {name: value for name, value in self.call.items() if name not in (*SIZES, "image_sizes")}
            kept.update({**sizes_of_import(self.call), "call": call})  # type: ignore[typeddict-item]
        return kept

    def _repr_html_(self) -> str:
        return display.schedule_html(self)

    def _repr_png_(self) -> bytes | None:
        return display.schedule_png(self) if display.can_draw() else None


@dataclass(frozen=True)
class ScheduleExport:
    """A schedule as a file for another program.

    Attributes:
        not_carried: what the file cannot carry, one sentence for each.
    """

    content: bytes
    file_name: str
    media_type: str
    not_carried: list[str]


class Resolution(BaseModel):
    """The schedule that `schedule: "auto"` samples with, and why. No schedule means untuned."""

    schedule: Schedule | None
    reason: str

    def to_diffusers(self, pipeline: Any) -> "TimeTunerScheduler":
        """`Schedule.to_diffusers`. Raises: NoScheduleError."""
        if self.schedule is None:
            raise NoScheduleError(self.reason)
        return self.schedule.to_diffusers(pipeline)

    def _repr_html_(self) -> str:
        return display.resolution_html(self)


class Alias(BaseModel):
    model: str
    name: str
    schedule: str


class Step(BaseModel):
    """The state of tuning one step of the sampler."""

    step_index: int
    t_ratio: float
    iterations: int
    loss: float | None
    initial_loss: float | None
    done: bool


class JobPhase(BaseModel):
    """A part of a tuning job, counted in network calls. `total` is an estimate."""

    name: Phase
    done: int
    total: int


class Job(BaseModel):
    """The fields of both kinds of jobs. Notebooks show how far a job is as a table with a bar."""

    id: str
    owner: str | None
    model: str
    state: JobState
    progress: float
    error: str | None
    request_id: str | None
    schedule: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    request: dict[str, Any]

    @property
    def is_over(self) -> bool:
        return self.finished_at is not None

    def _repr_html_(self) -> str:
        return display.job_html(self)

    def check(self) -> None:
        """Raises: JobFailedError, if the job failed or was cancelled."""
        if self.state in ("failed", "cancelled"):
            reason = f": {' '.join(self.error.split())}" if self.error else ""
            raise JobFailedError(f"job {self.id} {'has failed' if self.state == 'failed' else 'was cancelled'}{reason}")


class TuningJobFields(Job):
    """A tuning job. In lists and when just made, it has no phases, times, `timesteps` and `steps`."""

    group: str | None = None
    attempt: int
    cancel_requested: bool
    phase: Phase | None = None
    phases: list[JobPhase] = Field(default_factory=list)
    elapsed_seconds: float | None = None
    remaining_seconds: float | None = None
    timesteps: list[float] | None = None
    steps: list[Step] = Field(default_factory=list)


class TuningGroup(BaseModel):
    """Tuning jobs that were submitted together, as they were then; of a dry run, only the cost and the time.

    `cost` counts samples put through the network, at most, and `seconds` is the time of one worker for these.
    """

    id: str | None
    cost: int | None
    seconds: float | None
    progress: float
    is_over: bool
    jobs: list[TuningJobFields]


class SampleJobFields(Job):
    content: str | None
    dtype: str | None = None
    flagged: list[int] | None = None


class Event(BaseModel):
    id: int
    type: str
    data: dict[str, Any]
    created_at: datetime


class SampleEvent(BaseModel):
    """`state`, once, and `end`, at last, have the `job`; a `step` says which of how many, perhaps with a PNG."""

    type: Literal["state", "step", "end"]
    job: SampleJobFields | None = None
    step: int | None = None
    num_steps: int | None = None
    preview: bytes | None = None

    @field_validator("preview", mode="before")
    @classmethod
    def _decode(cls, value: Any) -> Any:
        return base64.b64decode(value) if isinstance(value, str) else value


class AuditEntry(BaseModel):
    id: str
    actor: str
    action: str
    object: str
    outcome: str
    request_id: str | None
    created_at: datetime


class Usage(BaseModel):
    """The use of one model by the jobs of one API key that ended on one day, in UTC."""

    day: date
    key: str | None
    key_name: str | None
    model: str
    model_name: str
    kind: Literal["tuning", "sampling"]
    network_calls: float
    network_rows: float
    device_seconds: float


class Readiness(BaseModel):
    """The state of each part of the service: `ok`, or its fault."""

    ready: bool
    database: str
    broker: str
    workers: str


class Health(BaseModel):
    status: str = "ok"


class Page(BaseModel, Generic[T]):
    items: list[T]
    next_cursor: str | None = None


@dataclass(frozen=True)
class Samples:
    """Samples. Notebooks show them as one picture.

    Attributes:
        array: float32 `(num_images, *image_shape)`; of images, -1 is black and 1 is white.
        job: the sampling job's id.
        schedule: the id of the schedule used, or None for untuned.
        flagged: the numbers of the images that a pipeline's safety checker held back.
    """

    array: NDArray[np.float32]
    job: str
    schedule: str | None
    flagged: Sequence[int] = ()

    @property
    def images(self) -> Sequence[Image.Image]:
        """Each at its own size. Raises: ValueError, of a model whose samples are no images."""
        self._check_images()
        return to_images(self.array)

    def to_png(self) -> bytes:
        """All images in one. Raises: ValueError, of a model whose samples are no images."""
        self._check_images()
        return to_png_grid(self.array)

    def _check_images(self) -> None:
        if not self.are_images:
            raise ValueError(f"samples of shape {self.array.shape[1:]} are no images; accepted: (1 or 3, H, W)")

    @property
    def are_images(self) -> bool:
        return self.array.ndim == 4 and self.array.shape[1] in (1, 3)

    def _repr_png_(self) -> bytes | None:
        return to_png_grid(self.array) if self.are_images else None
