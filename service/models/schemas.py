"""Requests and responses of the models endpoints."""

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from service.http.errors import Problem
from service.http.fields import ModelId, NextCursor, Owner, Private, Time
from service.models.registrations import refusal_of
from service.registry.tables import JobState, ModelRegistration
from service.shared.fields import PRINTABLE
from timetuner_core.catalog import BUILTINS, GuidanceType, ModelType

RegistrationState: TypeAlias = Literal["queued", "running", "refused"]
ModelState: TypeAlias = Literal["ready", "queued", "running", "refused"]
STATES: dict[JobState, RegistrationState] = {
    JobState.QUEUED: "queued",
    JobState.RUNNING: "running",
    JobState.FAILED: "refused",
    JobState.CANCELLED: "refused",
}


PRIVATE_MODEL = "Only the API key that registers it, and admins, see the model and what is made with it."


class BuiltinModelRequest(BaseModel):
    """Register a model that comes with the package."""

    model_config = ConfigDict(extra="forbid")

    builtin: Literal[BUILTINS] = Field(description="The name of the built-in model.")  # type: ignore[valid-type]
    name: str | None = Field(
        None, min_length=1, max_length=200, pattern=PRINTABLE, description="Default: the built-in's own name."
    )
    private: bool = Field(False, description=PRIVATE_MODEL)


class ModelSpec(BaseModel):
    """The properties of a model that requests depend on."""

    sample_shape: list[int] = Field(
        examples=[[1, 8, 8]], description="The shape of the network's input, such as [channels, height, width]."
    )
    image_shape: list[int] = Field(
        examples=[[1, 8, 8]], description="The shape of one sample as it is returned. A VAE decodes to another shape."
    )
    model_type: ModelType = Field(description="The quantity that the network predicts.")
    T: float = Field(examples=[1.0], description="The latest time, all noise. Times of schedules are in [0, T].")
    t_start: float | None = Field(
        None,
        examples=[1.0],
        description="The time at which named grids and teachers start: the latest one at which the network's error of "
        "x0 is small enough. Built-in models start at T. null: T, as the model was registered by an older version.",
    )
    x0_error_at_start: float | None = Field(
        None,
        examples=[2.9],
        description="The root mean square error of x0 at t_start, in standard deviations of the data; 1 for a network "
        "that only knows the data's mean. null: not measured.",
    )
    clipping: str | None = Field(
        None,
        examples=["none"],
        description="How the model's own scheduler clips x0, as requests say it; null: an older version registered it.",
    )
    num_train_timesteps: int | None = Field(
        examples=[1000], description="N, the most steps a sampler can take; null: no limit."
    )
    num_classes: int = Field(examples=[10], description="0: not class-conditional.")
    null_class_label: int | None = Field(examples=[10], description="The label that stands for no class.")
    condition_shape: list[int | None] | None = Field(
        examples=[None], description="[L, D] of tensor conditions, such as a text encoder's output; null L: any length."
    )
    guidance_types: list[GuidanceType] = Field(examples=[["uncond", "classifier-free"]])
    num_parameters: int = Field(examples=[1_135_649])
    has_uncond_condition: bool = Field(
        examples=[True], description="Whether the model has a condition that stands for none."
    )
    has_conditions: bool = Field(examples=[True], description="Whether tuning can draw conditions for guidance.")
    has_data: bool = Field(
        examples=[True], description="Whether data came with the model. Otherwise tuning generates data."
    )


IgnoredFiles = Annotated[
    list[Annotated[str, Field(examples=["safety_checker/pytorch_model.bin"])]],
    Field(description="The files of the archive that nothing reads, the first 100 of them."),
]


class ModelOut(BaseModel):
    """A model that can be tuned and sampled."""

    model_config = ConfigDict(from_attributes=True)

    id: ModelId
    name: str = Field(examples=["digits8"])
    content_hash: str = Field(examples=["sha256:9f86d081884c7d65"])
    state: Literal["ready"] = "ready"
    owner: Owner
    private: Private
    ignored_files: IgnoredFiles
    spec: ModelSpec
    created_at: Time


class ModelPage(BaseModel):
    items: list[ModelOut]
    next_cursor: NextCursor


class ModelRegistrationOut(BaseModel):
    """A model that was handed in and is not ready: it waits for a worker, or was refused."""

    id: ModelId = Field(description="The id that the model has once it is ready.")
    name: str = Field(examples=["my-model"])
    content_hash: str = Field(examples=["sha256:9f86d081884c7d65"])
    state: RegistrationState
    problem: Problem | None = Field(
        examples=[None], description="Why it was refused, as the answer to a request that waits says it."
    )
    owner: Owner
    private: Private
    ignored_files: IgnoredFiles
    created_at: Time

    @classmethod
    def of(cls, registration: ModelRegistration) -> Self:
        names = ("id", "name", "content_hash", "owner", "private", "ignored_files", "created_at")
        refusal = refusal_of(registration)
        return cls(
            **{name: getattr(registration, name) for name in names},
            state=STATES[registration.state],
            problem=None if refusal is None else refusal.problem(registration.request_id),
        )


class ModelRegistrationPage(BaseModel):
    items: list[ModelRegistrationOut]
    next_cursor: NextCursor
