"""Submitting sampling jobs and shaping their results."""

import base64
import io
import json
import math
import zipfile
from collections.abc import Callable
from decimal import Decimal
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sqlalchemy.orm import Session

from service.arrays import decode_array
from service.errors import InvalidError, NotAcceptableError, NotFoundError, TooLargeError
from service.models.logic import get_requested_model
from service.registry.database import Registry
from service.registry.tables import Model, SampleJob, Schedule
from service.requests import check_setting, check_timesteps, check_uncond
from service.samples.schemas import SampleRequest
from service.schedules.logic import find_for_sampling, resolve
from service.settings import Settings
from timetuner_core.samplers import get_sampler


def submit(registry: Registry, settings: Settings, request: SampleRequest) -> SampleJob:
    """Check a request, settle which schedule it uses, and make its job.

    Raises:
        InvalidError, TooLargeError: nothing was stored.
    """
    with registry.write() as session:
        model = get_requested_model(session, request.model)
        check_setting(model.spec, request)
        check_timesteps(request.timesteps, request.num_steps, model.spec["T"])
        _check_size(request, model, settings)
        labels = _class_labels(request, model)
        _check_conditions(request, model)
        if request.uncond_condition is None:
            takes_arrays = model.spec["condition_shape"] is not None
            check_uncond(model.spec, request, "uncond_condition" if takes_arrays else "guidance_scale 1")
        schedule = _schedule(session, request)
        job = SampleJob(
            model_id=model.id,
            schedule_id=schedule and schedule.id,
            request={**request.model_dump(mode="json"), "class_labels": labels},
        )
        session.add(job)
        session.flush()
        return job


def get_job(session: Session, job_id: str) -> SampleJob:
    """Raises: NotFoundError."""
    job = session.get(SampleJob, job_id)
    if job is None:
        raise NotFoundError(f"no sampling job {job_id!r}")
    return job


def _check_size(request: SampleRequest, model: Model, settings: Settings) -> None:
    if request.num_images > settings.max_images:
        message = f"num_images is {request.num_images}; accepted: 1 to {settings.max_images}"
        raise InvalidError(message, ("body", "num_images"), request.num_images)
    pixels = max(math.prod(model.spec["sample_shape"]), math.prod(model.spec["image_shape"]))
    calls = get_sampler(request.sampler).calls_per_step * (2 if request.guidance_type == "classifier-free" else 1)
    cost = pixels * request.num_steps * request.num_images * calls
    if cost > settings.max_pixel_steps:
        detail = f"values x steps x images x network calls is {cost}; accepted: up to {settings.max_pixel_steps}"
        raise TooLargeError(detail, ("body", "num_images"), request.num_images)


def _class_labels(request: SampleRequest, model: Model) -> list[int] | None:
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


def _check_conditions(request: SampleRequest, model: Model) -> None:
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


def _schedule(session: Session, request: SampleRequest) -> Schedule | None:
    if request.schedule == "none":
        return None
    if request.timesteps != "default":
        message = "timesteps is for untuned sampling; accepted: 'default', or schedule 'none'"
        raise InvalidError(message, ("body", "timesteps"), request.timesteps)
    if request.schedule == "auto":
        return resolve(session, request)[0]
    schedule = find_for_sampling(session, request.model, request.schedule)
    # A schedule may be tried at another guidance than it was tuned for, but its steps are its steps.
    if (schedule.sampler, schedule.num_steps) != (request.sampler, request.num_steps):
        message = f"schedule {schedule.id!r} is for {schedule.num_steps} steps of {schedule.sampler}"
        raise InvalidError(f"{message}; accepted: num_steps of {schedule.num_steps}", ("body", "num_steps"))
    return schedule


Images: TypeAlias = NDArray[np.float32]


def to_npy(images: Images) -> bytes:
    """The raw samples, float32 `(num_images, *image_shape)`, in numpy's own format."""
    buffer = io.BytesIO()
    np.save(buffer, images, allow_pickle=False)
    return buffer.getvalue()


def to_png_grid(images: Images) -> bytes:
    """All images in one, row by row, at least 64 pixels wide each."""
    pixels = _pixels(images)
    columns = math.ceil(math.sqrt(len(pixels)))
    height, width = pixels.shape[1:3]
    scale = max(1, math.ceil(64 / width))
    sheet = Image.new(
        _mode(pixels), (columns * (width * scale + 2) - 2, math.ceil(len(pixels) / columns) * (height * scale + 2) - 2)
    )
    for k, image in enumerate(pixels):
        row, column = divmod(k, columns)
        tile = _image(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (column * (width * scale + 2), row * (height * scale + 2)))
    return _png(sheet)


def to_png_zip(images: Images) -> bytes:
    """One PNG per image, at its own size: `000.png`, `001.png`, ..."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for k, image in enumerate(_pixels(images)):
            archive.writestr(f"{k:03d}.png", _png(_image(image)))
    return buffer.getvalue()


def to_json(images: Images) -> bytes:
    """`{"images": [base64 PNG, ...]}`; samples that are no images come as numbers, `{"samples": [...]}`."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        return json.dumps({"samples": images.tolist()}).encode()
    encoded = [base64.b64encode(_png(_image(image))).decode() for image in _pixels(images)]
    return json.dumps({"images": encoded}).encode()


FORMATS: dict[str, Callable[[Images], bytes]] = {
    "image/png": to_png_grid,
    "application/zip": to_png_zip,
    "application/x-npy": to_npy,
    "application/json": to_json,
}
ANY_TYPE = {"*/*": "image/png", "image/*": "image/png", "application/*": "application/x-npy"}


def negotiate(accept: str, image_shape: list[int]) -> str:
    """The first acceptable format of an Accept header. Raises: NotAcceptableError."""
    is_image = len(image_shape) == 3 and image_shape[0] in (1, 3)
    formats = [name for name in FORMATS if is_image or name in ("application/x-npy", "application/json")]
    ranges = [part.partition(";") for part in accept.split(",")]
    weighted = sorted(ranges, key=lambda part: -_quality(part[2]))
    for media_range, _, parameters in weighted:
        name = media_range.strip().lower()
        if name == "*/*" and not is_image:
            return "application/x-npy"
        name = ANY_TYPE.get(name, name)
        if name in formats and _quality(parameters) > 0:
            return name
    raise NotAcceptableError(
        f"Accept is {accept!r}; accepted for this model: {', '.join(formats)}", ("header", "Accept"), accept
    )


def _quality(parameters: str) -> Decimal:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = Decimal(value.strip())
            except ArithmeticError:
                return Decimal(0)
            return quality if quality.is_finite() else Decimal(0)
    return Decimal(1)


def _pixels(images: Images) -> NDArray[np.uint8]:
    """`(B, C, H, W)` in -1..1 to `(B, H, W, C)` in 0..255."""
    scaled = (np.clip(images, -1, 1) + 1) * 127.5
    return np.round(scaled).astype(np.uint8).transpose(0, 2, 3, 1)


def _mode(pixels: NDArray[np.uint8]) -> str:
    return "L" if pixels.shape[-1] == 1 else "RGB"


def _image(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
