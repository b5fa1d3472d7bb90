"""OpenAI's requests in terms of ours."""

import base64
import io
import secrets
from collections import Counter
from typing import Any

from PIL.Image import Image
from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.access.visibility import visible_model, visible_models
from service.http.errors import InvalidError, NotFoundError, ServiceError
from service.openai.schemas import ImageData, ImagesRequest, ModelInfo, OutputFormat
from service.registry.tables import Model
from service.shared.image_formats import Images, to_images
from service.shared.job_requests import SampleRequest
from service.shared.pipeline_calls import is_pipeline

MAX_SEED = 2**31 - 1
MAX_LISTED = 1000
# The fields of our requests that stand for a field of OpenAI's, by our name.
THEIR_NAMES = {"num_images": "n", "height": "size", "width": "size"}


def find_model(session: Session, caller: Caller, name: str) -> Model:
    """The model of an id, or the only one of a name. Raises: NotFoundError, naming the field."""
    model = visible_model(session, caller, name)
    if model is not None:
        return model
    named = session.scalars(visible_models(caller).where(Model.name == name).limit(2)).all()
    if len(named) == 1:
        return named[0]
    accepted = "accepted: a name or an id that GET /openai/v1/models lists"
    problem = f"several models are named {name!r}" if named else f"no model {name!r}"
    raise NotFoundError(f"{problem}; {accepted}", ("body", "model"), name)


def list_models(session: Session, caller: Caller) -> list[ModelInfo]:
    """The newest models that the caller sees and that make images."""
    rows = session.scalars(visible_models(caller).order_by(Model.id.desc()).limit(MAX_LISTED)).all()
    counts = Counter(row.name for row in rows)
    return [model_info(row, is_only=counts[row.name] == 1) for row in rows if makes_images(row)]


def model_info(model: Model, is_only: bool) -> ModelInfo:
    name = model.name if is_only else model.id
    return ModelInfo(id=name, created=int(model.created_at.timestamp()))


def makes_images(model: Model) -> bool:
    """Whether one sample of a model is an image, with one channel or three."""
    shape = model.spec.get("image_shape", [])
    return len(shape) == 3 and shape[0] in (1, 3)


def sample_request(model: Model, request: ImagesRequest) -> SampleRequest:
    """The request for samples. A seed that is left out is drawn. Raises: InvalidError, naming OpenAI's field."""
    if not makes_images(model):
        message = f"model {request.model!r} gives no images; accepted: one whose samples have one channel or three"
        raise InvalidError(message, ("body", "model"), request.model)
    n = request.n or 1
    given: dict[str, Any] = {
        "seed": secrets.randbelow(MAX_SEED - n) if request.seed is None else request.seed,
        "num_steps": request.num_steps,
        "schedule": request.schedule,
        "guidance_scale": request.guidance_scale,
        "negative_prompt": request.negative_prompt,
        "prompt": _prompt(model, request),
        **_sizes(model, request),
    }
    if not is_pipeline(model.spec) and request.guidance_scale is not None:
        message = f"guidance_scale is {request.guidance_scale}; accepted: null, as this model is no pipeline"
        raise InvalidError(message, ("body", "guidance_scale"), float(request.guidance_scale))
    fields = {name: value for name, value in given.items() if value is not None}
    return SampleRequest(model=model.id, num_images=n, **fields)


def their_error(error: ServiceError) -> ServiceError:
    """A refusal of our request, with the names of OpenAI's fields."""
    detail = error.detail.replace("num_images", "n")
    if not error.errors:
        return type(error)(detail)
    where, *rest = error.errors[0].loc
    return type(error)(detail, (where, *(THEIR_NAMES.get(f"{part}", part) for part in rest)), error.errors[0].input)


def encoded(images: Images, output_format: OutputFormat) -> list[ImageData]:
    """Images as base64 text, each at its own size."""
    return [ImageData(b64_json=_encoded(image, output_format)) for image in to_images(images)]


def size_of(images: Images) -> str:
    height, width = images.shape[-2:]
    return f"{width}x{height}"


def _encoded(image: Image, output_format: OutputFormat) -> str:
    buffer = io.BytesIO()
    every: dict[str, dict[str, Any]] = {"jpeg": {"quality": 95}, "webp": {"lossless": True}, "png": {}}
    image.save(buffer, output_format.upper(), **every[output_format])
    return base64.b64encode(buffer.getvalue()).decode()


def _prompt(model: Model, request: ImagesRequest) -> str | None:
    """The prompt, or None for a model that takes none."""
    if is_pipeline(model.spec) and "prompt" in model.spec["call"]:
        return request.prompt
    if request.prompt:
        message = f"model {request.model!r} takes no prompt; accepted: an empty one"
        raise InvalidError(message, ("body", "prompt"))
    return None


def _sizes(model: Model, request: ImagesRequest) -> dict[str, int]:
    """Height and width, if others than the model's own are asked for."""
    if request.size in (None, "auto"):
        return {}
    width, height = (int(number) for number in f"{request.size}".split("x"))
    own_height, own_width = model.spec["image_shape"][-2:]
    if (width, height) == (own_width, own_height):
        return {}
    if not is_pipeline(model.spec) or not {"height", "width"} <= model.spec["call"].keys():
        message = f"size is {request.size!r}; accepted for this model: 'auto', '{own_width}x{own_height}'"
        raise InvalidError(message, ("body", "size"), request.size)
    return {"height": height, "width": width}
