"""The setting that tuning and sampling requests name."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, WithJsonSchema

from service.shared.fields import Eta, ExactNumber, GuidanceScale, Identifier, NumSteps
from service.shared.sampler_facts import sampler_facts
from timetuner_core.catalog import GridName, GuidanceType, sampler_names


def _known_sampler(name: str) -> str:
    """Raises: ValueError."""
    sampler_facts(name)
    return name


Sampler = Annotated[str, AfterValidator(_known_sampler), WithJsonSchema({"type": "string", "enum": sampler_names()})]
GuidanceTime = Annotated[ExactNumber, Field(ge=0, le=1000)]
ALWAYS = {"guidance_scale": 1, "guidance_rescale": 0, "guidance_start": 0, "guidance_end": 1000}
Timesteps = GridName | Annotated[list[FiniteFloat], Field(min_length=2, max_length=100_001)]


class Setting(BaseModel):
    """What is sampled, and how: a schedule is tuned for one setting and resolved by it."""

    model_config = ConfigDict(extra="forbid")

    model: Identifier = Field(examples=["mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W"])
    num_steps: NumSteps = Field(examples=[2])
    sampler: Sampler = "ddim"
    guidance_type: GuidanceType = "uncond"
    guidance_scale: GuidanceScale = Field(1, validate_default=True)
    guidance_rescale: Annotated[ExactNumber, Field(ge=0, le=1)] = Field(
        0, validate_default=True, description="How far a classifier-free prediction's spread is brought back."
    )
    guidance_start: GuidanceTime = Field(0, validate_default=True, description="No guidance at times below.")
    guidance_end: GuidanceTime = Field(1000, validate_default=True, description="No guidance at times above.")
    eta: Eta = Field(0, validate_default=True, description="Noise of each step; for the sampler ddim only.")

    def key(self) -> dict[str, Any]:
        """The columns of `Schedule.KEY`. Unguided sampling has no scale, whatever was said."""
        guidance = ALWAYS if self.guidance_type == "uncond" else {name: getattr(self, name) for name in ALWAYS}
        names = ("sampler", "num_steps", "guidance_type", "eta")
        return {"model_id": self.model, **{name: getattr(self, name) for name in names}, **guidance}
