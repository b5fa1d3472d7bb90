"""The request for a tuning job, as it is accepted, stored and read by workers."""

from typing import TYPE_CHECKING, Annotated, Any, Self, Union

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from service.shared.fields import Seed
from service.shared.sampling_setting import SamplingSetting, Timesteps
from service.shared.webhook_url import WEBHOOK_URL, WebhookUrl
from timetuner_core.tuners import TUNERS, EndToEndTuner


def _objective(value: Any) -> str:
    """The objective that a request names, or the default."""
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
    teacher_num_steps: int = Field(100, ge=1, le=1000)
    batch_size: int = Field(64, ge=1, le=1024)


EXAMPLE: dict[str, Any] = {
    "model": "mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W",
    "num_steps": 10,
    "guidance_type": "classifier-free",
    "guidance_scale": 2.0,
}


def _any_of(schema: dict[str, Any]) -> None:
    """Describe the tuners by `anyOf`. To tools, a tuner without an objective is valid as several of them."""
    schema["anyOf"] = schema.pop("oneOf")


class TuningJobRequest(SamplingSetting):
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
        """Set the default, so that the stored request holds it."""
        if isinstance(self.tuner, EndToEndTuner) and self.tuner.start is None:
            self.tuner.start = "best" if self.timesteps == "default" else "given"
        return self
