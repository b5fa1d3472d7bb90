"""Requests and responses in the form of OpenAI's images API."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.shared.fields import GuidanceScale, NumSteps, Seed
from service.shared.job_requests import Prompt

MODEL_OR_NAME = {"min_length": 1, "max_length": 200}
SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
OutputFormat = Literal["png", "jpeg", "webp"]


class ImagesRequest(BaseModel):
    """Sample images. `seed` and what follows are ours: the `openai` package sends them in its `extra_body`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"model": "mdl_01JD3K5V8Q2M4N6P7R9S0T1V2W", "prompt": "a lighthouse at dusk", "num_steps": 6}]
        },
    )

    model: Annotated[str, Field(**MODEL_OR_NAME, description="A model's name or id.")]
    prompt: Prompt = Field(description="Empty for a model that takes none.")
    n: int | None = Field(1, ge=1, le=1000, description="Image k is drawn from seed + k.")
    size: Annotated[str, Field(pattern=SIZE)] | None = Field(
        "auto", examples=["1024x1024"], description="Width x height, in pixels. `auto`: the model's own."
    )
    response_format: Literal["b64_json"] | None = Field("b64_json", description="`url` is not offered.")
    output_format: OutputFormat | None = "png"
    # Fields of OpenAI's that our models lack are accepted if they ask for nothing.
    output_compression: Literal[100] | None = None
    quality: Literal["auto", "standard"] | None = None
    style: Literal["vivid"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    partial_images: Literal[0] | None = None
    stream: Literal[False] | None = None
    user: str | None = Field(None, max_length=1000, examples=[None], description="It is not looked at.")
    # The fields below are ours alone.
    seed: Seed | None = Field(None, description="Null: one by chance, which the answer tells.")
    num_steps: NumSteps | None = Field(None, description="A pipeline has a default of its own; networks need a number.")
    schedule: str | None = Field(
        None, max_length=64, examples=[None], description="`auto`, the default, `none`, an id or an alias."
    )
    guidance_scale: GuidanceScale | None = Field(None, description="For pipelines that take one.")
    negative_prompt: Prompt | None = Field(None, examples=[None], description="For pipelines that take one.")


class ImageData(BaseModel):
    b64_json: str = Field(examples=["iVBORw0KGgo="])


class ImagesResponse(BaseModel):
    """The images, and what they were drawn by."""

    created: int = Field(examples=[1764460800], description="Seconds since 1970.")
    data: list[ImageData]
    output_format: OutputFormat
    size: str = Field(examples=["1024x1024"])
    seed: int = Field(description="The first image's.")
    schedule: str | None = Field(examples=[None], description="The schedule that was used; null: untuned.")
    flagged: list[int] | None = Field(
        None, examples=[None], description="The images that the pipeline's safety checker held back, from 0."
    )


class ModelInfo(BaseModel):
    id: str = Field(examples=["sdxl"], description="Its name, or its id if another model has that name, too.")
    object: Literal["model"] = "model"
    created: int = Field(examples=[1764460800], description="Seconds since 1970.")
    owned_by: str = "timetuner"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ErrorDetail(BaseModel):
    message: str = Field(examples=["size: accepted: 'auto', or width x height"])
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["size"], description="The field that the error is about.")
    code: str | None = Field(examples=[None])


class ErrorBody(BaseModel):
    error: ErrorDetail
