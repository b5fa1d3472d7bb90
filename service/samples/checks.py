"""Checks of a sampling request against its model."""

import math
from collections.abc import Sequence

import numpy as np

from service.http.errors import InvalidError, TooLargeError
from service.registry.tables import Model
from service.request_checks import check_timesteps
from service.shared.arrays import decode_array
from service.shared.job_requests import OWN_SAMPLER, SampleRequest
from service.shared.pipeline_calls import is_pipeline, output_shape
from service.shared.sampler_facts import sampler_facts
from service.shared.settings import Settings


def shape_of(request: SampleRequest, model: Model) -> list[int]:
    """The shape of one sample of a request."""
    if not is_pipeline(model.spec):
        shape: list[int] = model.spec["image_shape"]
        return shape
    return output_shape(model.spec, request.height, request.width, request.call)


def check_grid(request: SampleRequest, model: Model) -> None:
    """Refuse a grid that does not fit, or that nothing would follow. Raises: InvalidError."""
    if request.sampler == OWN_SAMPLER and request.timesteps != "default":
        message = f"timesteps is given, and the sampler {OWN_SAMPLER!r} has its own; accepted: 'default', or a sampler"
        raise InvalidError(message, ("body", "timesteps"))
    check_timesteps(request.timesteps, request.num_steps, model.spec["T"])


def check_fields_of_networks(request: SampleRequest, model: Model) -> None:
    """Refuse what only networks have. A pipeline's labels are in its call, and only it can decode its latents.

    Raises:
        InvalidError.
    """
    if not is_pipeline(model.spec):
        return
    for name in ("class_labels", "condition", "uncond_condition"):
        if getattr(request, name) is not None:
            raise InvalidError(f"{name} is given; accepted for a pipeline: null, and arguments in call", ("body", name))


def check_size(request: SampleRequest, model: Model, shape: Sequence[int], settings: Settings) -> int:
    """The cost of a request whose samples have a shape. Raises: InvalidError, TooLargeError."""
    if request.num_images > settings.max_images:
        message = f"num_images is {request.num_images}; accepted: 1 to {settings.max_images}"
        raise InvalidError(message, ("body", "num_images"), request.num_images)
    cost = sampling_cost(request, model, shape)
    if cost > settings.max_pixel_steps:
        detail = f"values x steps x images x network calls is {cost}; accepted: up to {settings.max_pixel_steps}"
        raise TooLargeError(detail, ("body", "num_images"), request.num_images)
    return cost


def sampling_cost(request: SampleRequest, model: Model, shape: Sequence[int]) -> int:
    """Values x steps x images x network calls."""
    pixels: int = math.prod(shape)
    if is_pipeline(model.spec):  # Its guidance is its own business.
        return pixels * request.num_steps * request.num_images
    pixels = max(math.prod(model.spec["sample_shape"]), pixels)
    calls = sampler_facts(request.sampler).calls_per_step * (2 if request.guidance_type == "classifier-free" else 1)
    return pixels * request.num_steps * request.num_images * calls


def check_class_labels(request: SampleRequest, model: Model) -> list[int] | None:
    """One label per image, or None without guidance."""
    loc, given, num_classes = ("body", "class_labels"), request.class_labels, model.spec["num_classes"]
    if request.guidance_type == "uncond":
        if given is not None:
            raise InvalidError("class_labels needs a guidance_type other than 'uncond'", loc, given)
        return None
    if not num_classes:
        if given is not None:
            raise InvalidError("class_labels is not for this model; accepted: condition", loc, given)
        return None
    if given is None:
        raise InvalidError(f"class_labels is missing; accepted: 0 to {num_classes - 1}", loc)
    labels = [given] * request.num_images if isinstance(given, int) else given
    if len(labels) != request.num_images:
        message = f"class_labels has {len(labels)} labels; accepted: one, or as many as num_images"
        raise InvalidError(message, loc, given)
    for label in labels:
        if not 0 <= label < num_classes:
            message = f"class_labels has {label}; accepted for this model: 0 to {num_classes - 1}"
            raise InvalidError(message, loc, given)
    return labels


def check_conditions(request: SampleRequest, model: Model) -> None:
    """Refuse tensor conditions that the model has no use for, or that are missing or of another shape."""
    shape = model.spec["condition_shape"]
    guided = request.guidance_type != "uncond" and shape is not None
    for name, rows in (("condition", (1, request.num_images)), ("uncond_condition", (1,))):
        text = getattr(request, name)
        if text is None:
            if guided and name == "condition":
                raise InvalidError(f"condition is missing; accepted: {_describe(rows, shape)}", ("body", name))
            continue
        if not guided:
            raise InvalidError(f"{name} is for guided sampling of models with tensor conditions", ("body", name))
        _check_condition(name, text, rows, shape)


def _check_condition(name: str, text: str, rows: tuple[int, ...], shape: list[int | None]) -> None:
    try:
        array = decode_array(text)
    except ValueError as error:
        raise InvalidError(f"{name}: {error}; accepted: {_describe(rows, shape)}", ("body", name)) from None
    fits = array.ndim == 3 and len(array) in rows and array.shape[2] == shape[1]
    fits = fits and array.shape[1] >= 1 and shape[0] in (None, array.shape[1])
    if not fits or array.dtype != np.float32 or not np.isfinite(array).all():
        given = f"{array.dtype} of shape {array.shape}"
        raise InvalidError(f"{name} is {given}; accepted: {_describe(rows, shape)}", ("body", name))


def _describe(rows: tuple[int, ...], shape: list[int | None]) -> str:
    first = " or ".join(str(count) for count in sorted(set(rows)))
    return f"a base64 .npy file of finite float32 ({first}, {shape[0] or 'L'}, {shape[1]})"
