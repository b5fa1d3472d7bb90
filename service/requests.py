"""What tuning and sampling requests share: the setting they name, and its checks against the model."""

from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, WithJsonSchema
from sqlalchemy.orm import Session

from service.api import Eta, ExactNumber, GuidanceScale, Identifier, NumSteps
from service.errors import InvalidError, TooManyRequestsError
from service.registry.jobs import count_queued
from service.registry.tables import Job
from timetuner_core.grids import GridName
from timetuner_core.model_wrapper import GuidanceType
from timetuner_core.samplers import get_sampler, sampler_names


def _known_sampler(name: str) -> str:
    try:
        get_sampler(name)
    except (ImportError, AttributeError, TypeError) as error:  # a package that does not deliver
        raise ValueError(f"the sampler {name!r} cannot be loaded ({error})") from None
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


def check_setting(spec: dict[str, Any], setting: Setting, where: str = "body") -> None:
    """Refuse what the model or the sampler does not have. Raises: InvalidError."""

    def refuse(name: str, accepted: str) -> None:
        value = setting.model_dump(mode="json")[name]
        shown = f"{value:g}" if isinstance(value, float) else repr(value)
        raise InvalidError(f"{name} is {shown}; accepted: {accepted}", (where, name), value)

    limit = spec["num_train_timesteps"]
    if limit is not None and setting.num_steps > limit:
        refuse("num_steps", f"1 to {limit}, the steps this model was trained on")
    if setting.guidance_type not in spec["guidance_types"]:
        refuse("guidance_type", f"for this model {', '.join(spec['guidance_types']) or 'none'}")
    if setting.guidance_type == "uncond":
        for name, value in ALWAYS.items():
            if getattr(setting, name) != value:
                refuse(name, f"{value} when guidance_type is 'uncond'")
    if setting.guidance_rescale != 0 and setting.guidance_type != "classifier-free":
        refuse("guidance_rescale", "0 unless guidance_type is 'classifier-free'")
    if setting.guidance_start >= setting.guidance_end:
        refuse("guidance_start", f"below guidance_end, which is {setting.guidance_end:f}")
    if setting.eta != 0 and not get_sampler(setting.sampler).takes_eta:
        refuse("eta", f"0 for the sampler {setting.sampler!r}")


def check_uncond(spec: dict[str, Any], setting: Setting, accepted: str) -> None:
    """Refuse classifier-free guidance by more than the condition where nothing stands for "no condition".

    Raises: InvalidError.
    """
    needed = setting.guidance_type == "classifier-free" and setting.guidance_scale != 1
    if needed and not spec["has_uncond_condition"]:
        message = f"no condition that stands for none came with this model; accepted: {accepted}"
        raise InvalidError(message, ("body", "guidance_scale"), float(setting.guidance_scale))


def check_timesteps(timesteps: Timesteps, num_steps: int, T: float) -> None:
    """Refuse an explicit grid that does not fall within `[0, T]` in `num_steps` steps. Raises: InvalidError."""
    if isinstance(timesteps, str):
        return
    loc = ("body", "timesteps")
    if len(timesteps) != num_steps + 1:
        raise InvalidError(f"timesteps has {len(timesteps)} values; accepted: {num_steps + 1}", loc)
    if not (timesteps[0] <= T and timesteps[-1] >= 0 and all(t > s for t, s in pairwise(timesteps))):
        raise InvalidError(f"accepted as timesteps: strictly falling within [0, {T}]", loc, timesteps)


def check_room(session: Session, job_class: type[Job], max_queued_jobs: int) -> None:
    """Refuse a job when too many are waiting. Raises: TooManyRequestsError."""
    queued = count_queued(session, job_class)
    if queued >= max_queued_jobs:
        raise TooManyRequestsError(f"{queued} jobs are queued; accepted: fewer than {max_queued_jobs}")
