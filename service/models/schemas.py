"""Requests and responses of the models endpoints."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from service.http.errors import Problem
from service.http.fields import ModelId, NextCursor, Owner, PageQuery, Private, Search, Time
from service.models.registrations import refusal_of
from service.registry.tables import JobState, ModelRegistration
from service.shared.fields import PRINTABLE
from timetuner_core.catalog import BUILTINS, GuidanceType, ModelType

ModelSort: TypeAlias = Literal["newest", "oldest", "name"]
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


class ModelName(BaseModel):
    """A model's new name."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=200, pattern=PRINTABLE, examples=["my-digits"])


class ModelQuery(PageQuery):
    """The models that are listed, and their order."""

    search: Search = None
    sort: ModelSort = Field("newest", description="The order; `name` is without regard to case.")


Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
DTYPE = "The precision that a pipeline is served and tuned in; `auto` is that of its denoiser's files."


class FolderModelRequest(BaseModel):
    """The fields that registrations of folders on the operator's machines have in common."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(
        None, min_length=1, max_length=200, pattern=PRINTABLE, description="Default: the folder's."
    )
    private: bool = Field(False, description=PRIVATE_MODEL)
    dtype: Dtype = Field("auto", description=DTYPE)


def _is_below(path: str) -> str:
    """Raises: ValueError."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or ":" in path:
        raise ValueError(f"path is {path!r}; accepted: names of folders with / between them, without '..'")
    return path


class PathModelRequest(FolderModelRequest):
    """Register a pipeline in a folder below `MODELS_DIR`, where it stays."""

    path: Annotated[str, AfterValidator(_is_below)] = Field(
        min_length=1,
        max_length=1000,
        pattern=PRINTABLE,
        examples=["sdxl"],
        description="A folder in the format of diffusers, below the operator's `MODELS_DIR`.",
    )


class HubModelRequest(FolderModelRequest):
    """Register a pipeline in the workers' Hugging Face cache, where it stays."""

    hub: str = Field(
        min_length=3,
        max_length=200,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*/[A-Za-z0-9_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$",
        examples=["organisation/name"],
        description="Its name. It is downloaded only if the operator has set `ALLOW_DOWNLOADS`.",
    )
    revision: str = Field(
        "main",
        min_length=1,
        max_length=200,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*([./][A-Za-z0-9_-]+)*$",
        description="A branch, tag or commit. The model stays at the commit that it is now.",
    )


class CallArgument(BaseModel):
    """An argument of a pipeline's call that a request may give."""

    type: Literal["text", "integer", "number", "boolean", "image", "images", "integers", "numbers", "texts"] = Field(
        examples=["number"]
    )
    default: Any = Field(None, examples=[7.5], description="Its value where a request gives none.")
    required: bool = Field(examples=[False])


class Licence(BaseModel):
    """The licence of a pipeline, as its model card says it."""

    name: str | None = Field(examples=["openrail++"])
    source: str | None = Field(examples=["README.md"], description="The file that says it.")


class ModelSpec(BaseModel):
    """The properties of a model that requests depend on."""

    kind: Literal["network", "pipeline"] = Field(
        "network", description="`network`: a denoiser with its scheduler. `pipeline`: a whole one, which takes prompts."
    )
    sample_shape: list[int] = Field(
        examples=[[1, 8, 8]], description="The shape of the network's input, such as [channels, height, width]."
    )
    image_shape: list[int] = Field(
        examples=[[1, 8, 8]], description="The shape of one sample as it is returned. A VAE decodes to another shape."
    )
    model_type: ModelType = Field(
        description="The quantity that the network predicts. Of a pipeline that cannot be tuned: as its scheduler says."
    )
    T: float = Field(
        examples=[1.0],
        description="The latest time, all noise. Times of schedules are in [0, T]. 1 for a pipeline whose scheduler "
        "cannot be expressed: it has no schedules.",
    )
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
    pipeline: str | None = Field(None, examples=["StableDiffusionPipeline"], description="A pipeline's class.")
    scheduler: str | None = Field(None, examples=["DDIMScheduler"], description="The class of a pipeline's scheduler.")
    dtype: str | None = Field(None, examples=["float16"], description="The precision of a pipeline.")
    call: dict[str, CallArgument] | None = Field(
        None,
        examples=[{"guidance_scale": {"type": "number", "default": 7.5, "required": False}}],
        description="The arguments of a pipeline's call that requests may give, by name.",
    )
    output: Literal["images", "frames"] | None = Field(
        None, examples=["images"], description="What a pipeline gives; `frames`: each sample has shape (F, C, H, W)."
    )
    size_multiple: int | None = Field(
        None, examples=[8], description="A pipeline's height and width must be multiples of it."
    )
    tunable: str | None = Field(None, examples=[None], description="Why a pipeline cannot be tuned; null: it can.")
    flags_content: bool = Field(False, description="Whether a pipeline has a safety checker.")
    licence: Licence | None = Field(None, description="A pipeline's licence.")
    num_bytes: int | None = Field(None, examples=[123_372], description="The size of a pipeline's weights in memory.")


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
    path: str | None = Field(None, examples=[None], description="Its folder below `MODELS_DIR`, if it stayed there.")
    hub: str | None = Field(None, examples=[None], description="Its name in the Hugging Face cache, if it is there.")
    revision: str | None = Field(None, examples=[None], description="Its commit in the Hugging Face cache.")
    spec: ModelSpec
    created_at: Time


class ModelPage(BaseModel):
    items: list[ModelOut]
    next_cursor: NextCursor


class ModelRegistrationOut(BaseModel):
    """A model that was handed in and is not ready: it waits for a worker, or was refused."""

    id: ModelId = Field(description="The id that the model has once it is ready.")
    name: str = Field(examples=["my-model"])
    content_hash: str = Field(
        examples=["sha256:9f86d081884c7d65"],
        description="Until a worker has read files that are not uploaded, a hash of where they are.",
    )
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
