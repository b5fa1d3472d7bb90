"""The request for a tuning job, as it is accepted, stored and read by workers."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from service.shared.fields import Seed
from service.shared.sampling_setting import Setting, Timesteps
from service.shared.webhook_url import WEBHOOK_URL, WebhookUrl
from timetuner_core.catalog import Optimizer, Parameters, TuneType

BatchSize = Annotated[int, Field(ge=1, le=1024)]
PopulationSize = Annotated[int, Field(ge=1, le=65_536)]
TeacherNumSteps = Annotated[int, Field(ge=1, le=1000)]
NumCandidates = Annotated[int | None, Field(ge=2, le=4096, description="Times to choose from; null: enough.")]
BATCH_SIZE = "Samples per iteration (and per step, if per step)."


class Tuner(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EndToEndTuner(Tuner):
    """All steps together, so that the sampler's result matches a many-step teacher's. Needs no data."""

    objective: Literal["end_to_end"] = "end_to_end"
    parameters: Parameters = Field("both", description="What is learned: one ratio per step, the grid, or both.")
    start: Literal["given", "best"] | None = Field(
        None,
        description="The grid to begin with: `timesteps`, or the named one whose samples are nearest; null: the latter "
        "unless `timesteps` are given.",
    )
    batch_size: BatchSize = Field(16, description=BATCH_SIZE)
    lr: float = Field(1e-2, gt=0, le=1, description="Adam's learning rate, falling to 0.")
    total_iters: int = Field(100, ge=1, le=10_000)
    population_size: PopulationSize = Field(256, description="Initial noises to tune on.")
    teacher_num_steps: TeacherNumSteps = 50


class DataTuner(Tuner):
    """What draws from data needs to know of them."""

    batch_size: BatchSize = Field(16, description=BATCH_SIZE)
    population_size: PopulationSize = Field(1024, description="Data to draw from.")
    data: Literal["auto", "model", "generated"] = Field(
        "auto", description="The data that came with the model, or the teacher's samples; auto: the former if any."
    )
    teacher_num_steps: TeacherNumSteps = Field(50, description="Of the teacher that generates data, if any.")


class PerStepTuner(DataTuner):
    """One ratio per step, each by an objective of its own."""

    tune_type: TuneType = "parallel"
    spread: bool = Field(True, description="If parallel: one task per step, over all tuning workers; else one batch.")
    optimizer: Optimizer = Field("gauss_newton", description="The published optimiser is `adam`.")
    lr: float | None = Field(None, gt=0, le=1, description="Adam's learning rate; for Adam only, 0.002 if null.")
    total_iters: int | None = Field(
        None, ge=1, le=10_000, description="Per step, at most; 500 with Adam and 64 with Gauss-Newton if null."
    )
    tolerance: float | None = Field(
        None,
        ge=1e-6,
        le=1,
        description="Enough when a ratio's standard error is below; for Gauss-Newton only, 0.002 if null.",
    )

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        """Say in the request that is stored what the defaults were when it was made."""
        is_adam = self.optimizer == "adam"
        self.total_iters = self.total_iters or (500 if is_adam else 64)
        if is_adam and self.lr is None:
            self.lr = 2e-3
        if not is_adam and self.tolerance is None:
            self.tolerance = 2e-3
        return self


class NextEpsTuner(PerStepTuner):
    """The published objective: the network predicts after a step what it predicted before. The last keeps ratio 1."""

    objective: Literal["next_eps"]


class TeacherStepTuner(PerStepTuner):
    """Each step ends where the same sampler gets in many."""

    objective: Literal["teacher_step"]
    substeps: int = Field(8, ge=2, le=64, description="The teacher's steps for one of the sampler's.")


class AysTuner(DataTuner):
    """Align Your Steps (Sabour, Fidler & Kreis 2024): the grid of least bound on the KL divergence."""

    objective: Literal["ays"]
    num_candidates: NumCandidates = None
    num_samples: int = Field(64, ge=1, le=4096, description="Data to estimate the bound on.")


class GitsTuner(Tuner):
    """GITS (Chen et al., ICML 2024): the grid that stays nearest a many-step trajectory, by dynamic programming."""

    objective: Literal["gits"]
    batch_size: BatchSize = 16
    population_size: PopulationSize = Field(256, description="Initial noises whose trajectories are followed.")
    num_candidates: NumCandidates = None
    discount: float = Field(1.15, gt=0, le=10, description="Of the cost, per step; above 1, late steps weigh more.")


class DmnTuner(Tuner):
    """DMN (Xue et al., CVPR 2024): the grid of least bound on the result's error. Asks the network nothing."""

    objective: Literal["dmn"]
    power: float = Field(2.0, ge=0, le=10, description="The network's error is taken as sigma ** power / alpha.")


class GridTuner(Tuner):
    """Nothing is tuned: `timesteps` is evaluated against the default grid."""

    objective: Literal["grid"]


def _objective(value: Any) -> str:
    """Which tuner is meant; the default if none is named."""
    given = value.get("objective", "end_to_end") if isinstance(value, dict) else getattr(value, "objective", None)
    return str(given)


AnyTuner = Annotated[
    Annotated[EndToEndTuner, Tag("end_to_end")]
    | Annotated[NextEpsTuner, Tag("next_eps")]
    | Annotated[TeacherStepTuner, Tag("teacher_step")]
    | Annotated[AysTuner, Tag("ays")]
    | Annotated[GitsTuner, Tag("gits")]
    | Annotated[DmnTuner, Tag("dmn")]
    | Annotated[GridTuner, Tag("grid")],
    Discriminator(_objective),
]


class EvaluationRequest(BaseModel):
    """How the result is compared with the untuned sampler before it is stored."""

    model_config = ConfigDict(extra="forbid")

    num_samples: int = Field(512, ge=16, le=50_000)
    teacher_num_steps: int = Field(100, ge=1, le=1000)
    batch_size: int = Field(64, ge=1, le=1024)


EXAMPLE: dict[str, Any] = {
    "model": "mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W",
    "num_steps": 10,
    "guidance_type": "classifier-free",
    "guidance_scale": 2.0,
}


def _any_of(schema: dict[str, Any]) -> None:
    """A tuner without an objective is valid as one of them only, which tools do not see: they want `anyOf`."""
    schema["anyOf"] = schema.pop("oneOf")


class TuningJobRequest(Setting):
    """Tune one schedule."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [EXAMPLE]},
    )

    timesteps: Timesteps = Field("default", description="The grid to tune on: a name, or num_steps + 1 times.")
    tuner: AnyTuner = Field(default_factory=EndToEndTuner, json_schema_extra=_any_of)
    evaluation: EvaluationRequest = Field(default_factory=EvaluationRequest)
    seed: Seed = 0
    webhook_url: WebhookUrl | None = WEBHOOK_URL

    @model_validator(mode="after")
    def _choose_start(self) -> Self:
        """Say in the request that is stored what the default was when it was made."""
        if isinstance(self.tuner, EndToEndTuner) and self.tuner.start is None:
            self.tuner.start = "best" if self.timesteps == "default" else "given"
        return self
