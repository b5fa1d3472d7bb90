"""Types of requests. Fields that are left out have the service's defaults: see its `/docs`."""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, NotRequired, Required, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict  # Pydantic can read typing's own only from Python 3.12 on.

from service.client.choices import Dtype, GuidanceType, ModelKind, ModelSort, ScheduleSort, ScheduleStatus

Timesteps: TypeAlias = Literal["default", "uniform", "quadratic", "log_snr", "edm"] | Sequence[float]
Data: TypeAlias = Literal["auto", "model", "generated"]


class ModelSource(TypedDict, total=False):
    """A model to register: where it is, one of `builtin`, `archive`, `path` and `hub`, and what it is read as."""

    builtin: str | None
    archive: Path | str | None
    path: str | None
    hub: str | None
    revision: str
    kind: ModelKind
    dtype: Dtype
    name: str | None
    private: bool


class SettingOptions(TypedDict, total=False):
    """The optional fields of a setting."""

    sampler: str
    clipping: str | None
    guidance_type: GuidanceType
    guidance_scale: float
    guidance_rescale: float
    guidance_start: float
    guidance_end: float
    eta: float


class CallOptions(TypedDict, total=False):
    """Arguments of a pipeline's own call. Images in `call` are data URLs, `data:image/png;base64,...`."""

    height: int | None
    width: int | None
    call: Mapping[str, Any]


class IntervalOptions(TypedDict, total=False):
    """The intervals that one schedule serves all of.

    `guidance_scales` in place of `guidance_scale` are the lowest and the highest. For pipelines, `sizes` in place of
    `height` and `width` are several (height, width).
    """

    guidance_scales: Sequence[float] | None
    sizes: Sequence[Sequence[int]] | None


class Setting(SettingOptions, CallOptions, total=False):
    """A model and how it is sampled. A schedule is tuned for one setting and found by it."""

    model: Required[str]
    num_steps: Required[int]


class EndToEndTuner(TypedDict, total=False):
    objective: Literal["end_to_end"]
    parameters: Literal["t_ratios", "timesteps", "both"]
    start: Literal["given", "best"] | None
    batch_size: int
    lr: float
    total_iters: int
    population_size: int
    teacher_num_steps: int
    relaxed_start: float


class SolverTuner(TypedDict, total=False):
    objective: Required[Literal["solver"]]
    start: Literal["given", "best"] | None
    batch_size: int
    total_iters: int
    population_size: int
    teacher_num_steps: int
    with_ratios: bool


class PerStepTuner(TypedDict, total=False):
    batch_size: int
    population_size: int
    data: Data
    teacher_num_steps: int
    tune_type: Literal["sequential", "parallel"]
    spread: bool
    optimizer: Literal["gauss_newton", "adam"]
    lr: float | None
    total_iters: int | None
    tolerance: float | None


class NextEpsTuner(PerStepTuner, total=False):
    objective: Required[Literal["next_eps"]]


class TeacherStepTuner(PerStepTuner, total=False):
    objective: Required[Literal["teacher_step"]]
    substeps: int


class AysTuner(TypedDict, total=False):
    objective: Required[Literal["ays"]]
    batch_size: int
    population_size: int
    data: Data
    teacher_num_steps: int
    num_candidates: int | None
    num_samples: int


class AysListTuner(TypedDict, total=False):
    objective: Required[Literal["ays_list"]]
    levels_of: Literal["sd15", "sdxl", "svd"]


class GitsTuner(TypedDict, total=False):
    objective: Required[Literal["gits"]]
    batch_size: int
    population_size: int
    num_candidates: int | None
    discount: float


class OssTuner(TypedDict, total=False):
    objective: Required[Literal["oss"]]
    batch_size: int
    population_size: int
    num_candidates: int | None


class DcSolverTuner(TypedDict, total=False):
    objective: Required[Literal["dc_solver"]]
    batch_size: int
    population_size: int
    teacher_num_steps: int


class DmnTuner(TypedDict, total=False):
    objective: Required[Literal["dmn"]]
    power: float


class GridTuner(TypedDict):
    objective: Literal["grid"]


class PipelineTuner(TypedDict, total=False):
    objective: Required[Literal["pipeline"]]
    total_iters: int
    num_samples: int
    max_batch: int


class EvaluationRequest(TypedDict, total=False):
    num_samples: int
    max_num_samples: int | None
    teacher_num_steps: int
    batch_size: int


class TuningJobRequest(Setting, IntervalOptions, total=False):
    """Tune one schedule."""

    timesteps: Timesteps
    prompts: Sequence[str] | None
    negative_prompt: str | None
    tuner: (
        EndToEndTuner
        | SolverTuner
        | NextEpsTuner
        | TeacherStepTuner
        | AysTuner
        | AysListTuner
        | GitsTuner
        | OssTuner
        | DcSolverTuner
        | DmnTuner
        | GridTuner
        | PipelineTuner
    )
    evaluation: EvaluationRequest
    seed: int
    private: bool
    webhook_url: str | None


class SampleRequest(SettingOptions, CallOptions, total=False):
    """Sample images. `condition` is `(1 or num_images, L, D)`, `uncond_condition` `(1, L, D)`, both sent as float32.

    Networks need `num_steps`; a pipeline has a default.
    """

    model: Required[str]
    num_steps: int
    prompt: str | None
    negative_prompt: str | None
    timesteps: Timesteps
    schedule: str
    num_images: int
    seed: int
    condition: NDArray[np.floating] | None
    uncond_condition: NDArray[np.floating] | None
    class_labels: int | Sequence[int] | None
    deadline_seconds: float | None
    webhook_url: str | None
    previews: bool


class SolverTable(TypedDict):
    """A learned solver: `x_{i+1} = a_i x_i + sum_{j <= i} b_ij x0_j (+ eps_i eps)`. Row i of `b` has i + 1 numbers.

    `times` are those of the network calls, where a step has several. `eps` are factors of the noise predicted.
    """

    a: Sequence[float]
    b: Sequence[Sequence[float]]
    times: NotRequired[Sequence[float] | None]
    eps: NotRequired[Sequence[float] | None]


class ScheduleImport(Setting, IntervalOptions, total=False):
    """A schedule made elsewhere; `Schedule.to_import()` is one.

    `image_sizes`, of (width, height), stand for images in `call` that decide the size of a pipeline's result.
    """

    timesteps: Required[Sequence[float]]
    t_ratios: Required[Sequence[float]]
    solver_table: SolverTable | None
    image_sizes: Sequence[Sequence[int]] | None
    provenance: dict[str, Any]
    private: bool
    model_content_hash: str | None
    override: bool


class ModelFilters(TypedDict, total=False):
    """`search` is a part of the name or id, without regard to case; `sort` is the order."""

    search: str
    sort: ModelSort


class ScheduleFilters(SettingOptions, total=False):
    """A schedule in a list matches all that are given; each but `search` is exact.

    `search` is a part of the id, of an alias or of the model's name, without regard to case; `sort` is the order, and
    `score` leaves out imported schedules, which have none.
    """

    model: str
    num_steps: int
    status: ScheduleStatus
    search: str
    sort: ScheduleSort


class UsageFilters(TypedDict, total=False):
    """The days `since` to `until`, both included, in UTC; a model's id; a key's id."""

    since: date | str | None
    until: date | str | None
    model: str | None
    key: str | None
