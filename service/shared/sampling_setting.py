"""The setting, which is the part that tuning and sampling requests share."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, WithJsonSchema

from service.shared.fields import Eta, ExactNumber, GuidanceScale, Identifier, NumSteps
from service.shared.sampler_facts import sampler_facts
from timetuner_core.catalog import GridName, GuidanceType, sampler_names


def _known_sampler(name: str) -> str:
    """Raises: ValueError, naming the sampler."""
    sampler_facts(name)
    return name


SamplerName = Annotated[
    str, AfterValidator(_known_sampler), WithJsonSchema({"type": "string", "enum": sampler_names()})
]
GuidanceTime = Annotated[ExactNumber, Field(ge=0, le=1000)]
ALWAYS = {"guidance_scale": 1, "guidance_rescale": 0, "guidance_start": 0, "guidance_end": 1000}
Timesteps = GridName | Annotated[list[FiniteFloat], Field(min_length=2, max_length=100_001)]


class SamplingSetting(BaseModel):
    """A model and how it is sampled. A schedule is tuned for one setting and found by it."""

    model_config = ConfigDict(extra="forbid")

    model: Identifier = Field(examples=["mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W"])
    num_steps: NumSteps = Field(examples=[2])
    sampler: SamplerName = "ddim"
    guidance_type: GuidanceType = "uncond"
    guidance_scale: GuidanceScale = Field(1, validate_default=True)
    guidance_rescale: Annotated[ExactNumber, Field(ge=0, le=1)] = Field(
        0, validate_default=True, description="How far the spread of a classifier-free prediction is reset, 0 to 1."
    )
    guidance_start: GuidanceTime = Field(0, validate_default=True, description="No guidance at times below.")
    guidance_end: GuidanceTime = Field(1000, validate_default=True, description="No guidance at times above.")
    eta: Eta = Field(0, validate_default=True, description="The noise of each step, for the sampler ddim only.")

    @classmethod
    def stored(cls, row: Mapping[str, Any] | Self) -> Self:
        """The request that a job's row holds as JSON. Fields of a newer version, at any depth, are ignored.

        Raises:
            ValidationError: a field has a value that this version does not know.
        """
        return cls.model_validate(row, extra="ignore")

    def key(self) -> dict[str, Any]:
        """The columns of `Schedule.KEY`. Unguided sampling has the values of `ALWAYS`."""
        guidance = ALWAYS if self.guidance_type == "uncond" else {name: getattr(self, name) for name in ALWAYS}
        names = ("sampler", "num_steps", "guidance_type", "eta")
        return {"model_id": self.model, **{name: getattr(self, name) for name in names}, **guidance}
