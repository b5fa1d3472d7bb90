"""The requests of jobs, as they are accepted, stored and read by workers, and the setting that they share."""

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Self, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    WithJsonSchema,
    model_validator,
)

from service.shared.fields import Eta, ExactNumber, GuidanceScale, Identifier, NumSteps, Seed
from service.shared.pipeline_calls import (
    DEFAULT_NUM_STEPS,
    MAX_TEXT,
    call_key,
    deciding_arguments,
    plain_arguments,
    size_intervals,
)
from service.shared.sampler_facts import sampler_facts
from service.shared.webhook_url import WEBHOOK_URL, WebhookUrl
from timetuner_core.catalog import GridName, GuidanceType, sampler_names
from timetuner_core.clipping import Clipping, clipping_text
from timetuner_core.tuners import (
    MAX_CALLS_OF_DEFAULT_SOLVER,
    TUNERS,
    EndToEndTuner,
    TeacherMatchingTuner,
    default_tuner,
)

OWN_SAMPLER = "own"  # A pipeline's own scheduler.


def _known_sampler(name: str) -> str:
    """Raises: ValueError, naming the sampler."""
    sampler_facts(name)
    return name


SamplerName = Annotated[
    str, AfterValidator(_known_sampler), WithJsonSchema({"type": "string", "enum": sampler_names()})
]


def _own_or_known_sampler(name: str) -> str:
    """Raises: ValueError, naming the sampler."""
    return name if name == OWN_SAMPLER else _known_sampler(name)


AnySamplerName = Annotated[
    str,
    AfterValidator(_own_or_known_sampler),
    WithJsonSchema({"type": "string", "enum": [OWN_SAMPLER, *sampler_names()]}),
]


def _canonical(text: str) -> str:
    """Raises: ValueError, saying what is accepted."""
    return clipping_text(Clipping.parse(text))


ClippingText = Annotated[str, Field(max_length=200), AfterValidator(_canonical)]
OWN_CLIPPING = "own"  # The registry's word for the clipping of the model's own scheduler, which requests leave null.
GuidanceTime = Annotated[ExactNumber, Field(ge=0, le=1000)]
ONE_SCALE = Decimal(0)  # The registry's word for the end of an interval of guidance scales where there is none.
ALWAYS = {"guidance_scale": 1, "guidance_rescale": 0, "guidance_start": 0, "guidance_end": 1000}
MAX_SIZES = 64
NOT_GIVEN = 0  # The number of steps of a request that leaves it to the pipeline.
Prompt = Annotated[str, Field(max_length=MAX_TEXT)]
# With a bound, a text that has half of a surrogate pair is refused: no answer and no hash could hold it.
Base64 = Annotated[str, Field(min_length=1)]
Size = Annotated[int, Field(ge=1, le=16_384)]
GuidanceScales = Annotated[list[GuidanceScale], Field(min_length=2, max_length=2)]
HeightAndWidth = Annotated[list[Size], Field(min_length=2, max_length=2)]
Timesteps = GridName | Annotated[list[FiniteFloat], Field(min_length=2, max_length=100_001)]


class SamplingSetting(BaseModel):
    """A model and how it is sampled. A schedule is tuned for one setting and found by it."""

    model_config = ConfigDict(extra="forbid")

    model: Identifier = Field(examples=["mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W"])
    num_steps: NumSteps = Field(examples=[2])
    sampler: SamplerName = "ddim"
    clipping: ClippingText | None = Field(
        None,
        examples=[None],
        description="How the predicted x0 is clipped, for samplers that do so: `none`, `clip_sample_range=1`, or "
        "`dynamic_thresholding_ratio=0.995,sample_max_value=1.5`, say. Null: as the model's own scheduler does, which "
        "the model's `spec` shows.",
    )
    guidance_type: GuidanceType = "uncond"
    guidance_scale: GuidanceScale = Field(1, validate_default=True)
    guidance_rescale: Annotated[ExactNumber, Field(ge=0, le=1)] = Field(
        0, validate_default=True, description="How far the spread of a classifier-free prediction is reset, 0 to 1."
    )
    guidance_start: GuidanceTime = Field(0, validate_default=True, description="No guidance at times below.")
    guidance_end: GuidanceTime = Field(1000, validate_default=True, description="No guidance at times above.")
    eta: Eta = Field(0, validate_default=True, description="The noise of each step, for the sampler ddim only.")
    height: Size | None = Field(None, examples=[None], description="For pipelines, in pixels; null: its own default.")
    width: Size | None = Field(None, examples=[None])
    call: Annotated[dict[str, Any], AfterValidator(plain_arguments)] = Field(
        {},
        examples=[{}],
        description="Further arguments of a pipeline's own call, such as `{\"num_frames\": 9}`: the model's "
        "`spec.call` lists their types and defaults. Images are data URLs, `data:image/png;base64,...`, of PNG, JPEG "
        "or WebP.",
    )

    @classmethod
    def stored(cls, row: Mapping[str, Any] | Self) -> Self:
        """The request that a job's row holds as JSON. Fields of a newer version, at any depth, are ignored.

        Raises:
            ValidationError: a field has a value that this version does not know.
        """
        return cls.model_validate(row, extra="ignore")

    def deciding(self) -> dict[str, Any]:
        """The arguments of a pipeline's call that a schedule belongs to; see `deciding_arguments`."""
        return deciding_arguments(self.height, self.width, self.call)

    def key(self) -> dict[str, Any]:
        """The columns of `Schedule.KEY`. Unguided sampling has the values of `ALWAYS`.

        A pipeline guides by itself: its type is `uncond`, and its `guidance_scale` is that of its call.
        """
        guidance = {name: getattr(self, name) for name in ALWAYS}
        if self.guidance_type == "uncond":
            guidance = {**ALWAYS, "guidance_scale": self.guidance_scale}
        names = ("sampler", "num_steps", "guidance_type", "eta")
        clipping = {"clipping": self.clipping or OWN_CLIPPING}
        call = {"call_key": call_key(self.deciding())}
        named = {name: getattr(self, name) for name in names}
        return {"model_id": self.model, **named, **clipping, **guidance, **call, "guidance_scale_high": ONE_SCALE}


class SettingOfIntervals(SamplingSetting):
    """A setting that may have several sizes, or an interval of guidance scales."""

    guidance_scales: GuidanceScales | None = Field(
        None,
        examples=[None],
        description="In place of `guidance_scale`: the lowest and the highest. Samples are tuned at scales drawn from "
        "between, and the schedule serves all of them. It is evaluated at both ends and in the middle, and accepted "
        "only if it is accepted at all three. The tuners `end_to_end`, `solver` and `pipeline` take it.",
    )

    sizes: Annotated[list[HeightAndWidth], Field(min_length=2, max_length=MAX_SIZES)] | None = Field(
        None,
        examples=[None],
        description="For pipelines, in place of `height` and `width`: several [height, width]. Images have them in "
        "turn, and the schedule serves all heights and all widths from the smallest to the largest.",
    )

    def deciding(self) -> dict[str, Any]:
        """As of one size, with intervals in place of the sizes."""
        return super().deciding() | ({} if self.sizes is None else size_intervals(self.sizes))

    def key(self) -> dict[str, Any]:
        """As of one guidance scale, with both ends of an interval."""
        if self.guidance_scales is None:
            return super().key()
        low, high = self.guidance_scales
        return super().key() | {"guidance_scale": low, "guidance_scale_high": high}


def _objective(value: Any) -> str:
    """The objective that a tuner names; `end_to_end` if it has none, as clients of before `solver` mean that."""
    given = value.get("objective", "end_to_end") if isinstance(value, dict) else getattr(value, "objective", None)
    return str(given)


if TYPE_CHECKING:
    from timetuner_core.tuners import AnyTuner
else:
    _TAGGED = [Annotated[tuner, Tag(objective)] for objective, tuner in TUNERS.items()]
    AnyTuner = Annotated[Union[*_TAGGED], Discriminator(_objective)]


class EvaluationRequest(BaseModel):
    """How the result is compared with the untuned sampler before it is stored."""

    model_config = ConfigDict(extra="forbid")

    num_samples: int = Field(512, ge=16, le=50_000)
    max_num_samples: int | None = Field(
        None,
        ge=16,
        le=200_000,
        description="While the verdict is undecided, `num_samples` is doubled, up to this; null: four times as many.",
    )
    teacher_num_steps: int = Field(100, ge=1, le=1000)
    batch_size: int = Field(64, ge=1, le=1024)

    @property
    def most_samples(self) -> int:
        """The most that the evaluation may take."""
        return 4 * self.num_samples if self.max_num_samples is None else max(self.num_samples, self.max_num_samples)


TUNING_EXAMPLE: dict[str, Any] = {
    "model": "mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W",
    "num_steps": 10,
    "guidance_type": "classifier-free",
    "guidance_scale": 2.0,
}


def _any_of(schema: dict[str, Any]) -> None:
    """Describe the tuners by `anyOf`. To tools, a tuner without an objective is valid as several of them."""
    schema["anyOf"] = schema.pop("oneOf")


PRIVATE_SCHEDULE = Field(False, description="Only the API key that makes the schedule, and admins, see and use it.")


class TuningJobRequest(SettingOfIntervals):
    """Tune one schedule."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [TUNING_EXAMPLE]},
    )

    timesteps: Timesteps = Field("default", description="The grid to tune on: a name, or num_steps + 1 times.")
    prompts: Annotated[list[Prompt], Field(min_length=2, max_length=1000)] | None = Field(
        None,
        examples=[None],
        description="For pipelines: every fourth prompt is held out for the evaluation. Null: 64 of ours.",
    )
    negative_prompt: Prompt | None = Field(None, examples=[None], description="For pipelines that take one.")
    tuner: AnyTuner = Field(
        default_factory=EndToEndTuner,
        json_schema_extra=_any_of,
        description=f"How to tune. Left out: `solver`, for up to {MAX_CALLS_OF_DEFAULT_SOLVER} network calls of a "
        "sampler without noise, else `end_to_end`. A tuner without `objective` is `end_to_end`. Pipelines have one "
        "tuner, `pipeline`.",
    )
    evaluation: EvaluationRequest = Field(default_factory=EvaluationRequest)
    seed: Seed = 0
    private: bool = PRIVATE_SCHEDULE
    webhook_url: WebhookUrl | None = WEBHOOK_URL

    @model_validator(mode="after")
    def _choose_defaults(self) -> Self:
        """Set the defaults that depend on other fields, so that the stored request holds them."""
        given = set(self.model_fields_set)
        if "tuner" not in self.model_fields_set:
            self.tuner = default_tuner(self.num_steps, sampler_facts(self.sampler), float(self.eta))
        if isinstance(self.tuner, TeacherMatchingTuner) and self.tuner.start is None:
            self.tuner.start = "best" if self.timesteps == "default" else "given"
        # The fields that the request left out are known later, too: a pipeline has other defaults.
        self.model_fields_set.intersection_update(given)
        return self


def _without_default(schema: dict[str, Any]) -> None:
    """Describe a field that may be left out by some, whose default is no value that may be given."""
    schema.pop("default", None)


class SampleRequest(SamplingSetting):
    """Sample images."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "model": "mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W",
                    "num_steps": 10,
                    "num_images": 4,
                    "guidance_type": "classifier-free",
                    "guidance_scale": 2.0,
                    "class_labels": [0, 1, 2, 3],
                    "seed": 7,
                }
            ]
        },
    )

    num_steps: NumSteps = Field(
        NOT_GIVEN,
        examples=[10],
        json_schema_extra=_without_default,
        description=f"Of a pipeline, {DEFAULT_NUM_STEPS} if it is left out; networks need a number.",
    )
    sampler: AnySamplerName = Field(
        "ddim",
        description="For pipelines, `own` is the default: untuned, the pipeline's own scheduler takes the steps, and a "
        "schedule may be of any sampler.",
    )
    prompt: Prompt | None = Field(
        None, examples=[None], description="For pipelines that take one. All images of a request have the same."
    )
    negative_prompt: Prompt | None = Field(None, examples=[None])
    timesteps: Timesteps = Field(
        "default", description="The grid of untuned sampling, a name or num_steps + 1 times; a schedule has its own."
    )
    schedule: Identifier = Field(
        "auto",
        description="`auto`: the best accepted one for this setting, else untuned; `none`: untuned; an id; an alias.",
    )
    num_images: int = Field(1, ge=1, le=100_000)
    seed: Seed = Field(0, description="Image k is drawn from seed + k, whatever the number of images.")
    condition: Base64 | None = Field(
        None,
        description="Tensor conditions, if the model takes any: base64 .npy file of float32 `(1 or num_images, L, D)`.",
    )
    uncond_condition: Base64 | None = Field(
        None,
        description="The condition that stands for none, `(1, L, D)`. The default is the one that came with the model.",
    )
    class_labels: int | list[int] | None = Field(
        None, description="One label for all images, or one for each. Only guided requests have labels."
    )
    deadline_seconds: FiniteFloat | None = Field(
        None,
        gt=0,
        le=86_400,
        description="A job that has not begun by then is dropped, and a request that waits for it gets 504.",
    )
    webhook_url: WebhookUrl | None = WEBHOOK_URL
    previews: bool = Field(False, description="The event stream shows what each step predicts.")
