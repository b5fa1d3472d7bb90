"""Checks that tuning and sampling requests share: the model, the setting, the queue and the webhook they name."""

import ipaddress
from decimal import Decimal
from itertools import pairwise
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.access.visibility import visible_model, visible_models, visible_registration
from service.http.errors import InvalidError, TooManyRequestsError
from service.registry.jobs import count_queued
from service.registry.models import why_not_ready
from service.registry.tables import Model, TuningJob
from service.shared.addresses import is_allowed
from service.shared.job_requests import ALWAYS, NOT_GIVEN, OWN_SAMPLER, SamplingSetting, Timesteps
from service.shared.pipeline_calls import (
    DEFAULT_NUM_STEPS,
    SIZES,
    ArgumentError,
    check_arguments,
    image_sizes,
    is_pipeline,
)
from service.shared.sampler_facts import sampler_facts
from service.shared.settings import Settings
from timetuner_core.clipping import CLIP_RULES, Clipping

# Fields that networks have, with the only value that pipelines take. Their own guidance and noise are in `call`.
OF_NETWORKS = {
    "guidance_type": "uncond",
    **{name: value for name, value in ALWAYS.items() if name != "guidance_scale"},
    "eta": 0,
    "clipping": None,
}
Setting = TypeVar("Setting", bound=SamplingSetting)
# Fields that only pipelines have, with the value that stands for none.
OF_PIPELINES: dict[str, Any] = {
    "prompt": None,
    "prompts": None,
    "negative_prompt": None,
    "height": None,
    "width": None,
    "sizes": None,
    "image_sizes": None,
    "call": {},
}
INTERVAL_ACCEPTED = "the lowest guidance scale, then a higher one"


def get_requested_model(session: Session, caller: Caller, model_id: str, where: str = "body") -> Model:
    """The model that a request's body or query names. Raises: InvalidError, naming the field."""
    model = visible_model(session, caller, model_id)
    if model is None:
        registration = visible_registration(session, caller, model_id)
        if registration is not None and (reason := why_not_ready(session, registration)):
            raise InvalidError(reason, (where, "model"), model_id)
        accepted = "the id of a registered model, as GET /v1/models lists them"
        of_name = visible_models(caller).where(Model.name == model_id)
        named = session.scalar(of_name.with_only_columns(Model.id).order_by(Model.id.desc()).limit(1))
        if named is not None:
            accepted = f"an id; that of the newest model of this name is {named!r}"
        raise InvalidError(f"no model {model_id!r}; accepted: {accepted}", (where, "model"), model_id)
    return model


def settled(
    spec: dict[str, Any], setting: Setting, default_sampler: str, where: str = "body", *, is_run: bool = True
) -> Setting:
    """A setting that the model supports, as it is stored and looked up: a pipeline's own defaults are filled in.

    Args:
        default_sampler: a pipeline's, where the request leaves it out.
        is_run: whether the request runs the model, and so needs all arguments without a default.

    Raises:
        InvalidError.
    """
    setting = _with_lowest_scale(setting, where)
    if is_pipeline(spec):
        return _settled_for_pipeline(spec, setting, default_sampler, where, is_run)
    for name, none in OF_PIPELINES.items():
        if getattr(setting, name, none) != none:
            message = f"{name} is given, and this model is a network; accepted: {name} for pipelines"
            raise InvalidError(message, (where, name))
    if setting.num_steps == NOT_GIVEN:
        raise InvalidError(
            "num_steps is missing; accepted: a number, for a model that is a network", (where, "num_steps")
        )
    if setting.sampler == OWN_SAMPLER:
        message = f"sampler is {OWN_SAMPLER!r}; accepted: {OWN_SAMPLER!r} for pipelines, for networks another"
        raise InvalidError(message, (where, "sampler"), OWN_SAMPLER)
    check_setting(spec, setting, where)
    return setting


def _with_lowest_scale(setting: Setting, where: str) -> Setting:
    """A setting whose `guidance_scale` is the lowest of its interval, if it has one. Raises: InvalidError."""
    scales = getattr(setting, "guidance_scales", None)
    if scales is None:
        return setting
    low, high = scales
    loc, given = (where, "guidance_scales"), [float(low), float(high)]
    if not low < high:
        raise InvalidError(f"guidance_scales is {given}; accepted: {INTERVAL_ACCEPTED}", loc, given)
    if "guidance_scale" in setting.model_fields_set and setting.guidance_scale != low:
        message = f"guidance_scale is {setting.guidance_scale}; accepted beside guidance_scales: none, or the lowest"
        raise InvalidError(message, (where, "guidance_scale"), float(setting.guidance_scale))
    return setting.model_copy(update={"guidance_scale": low})


def check_setting(spec: dict[str, Any], setting: SamplingSetting, where: str = "body") -> None:
    """Refuse a setting that the model or the sampler does not support. Raises: InvalidError."""

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
        if getattr(setting, "guidance_scales", None) is not None:
            refuse("guidance_scales", "null when guidance_type is 'uncond'")
        for name, value in ALWAYS.items():
            if getattr(setting, name) != value:
                refuse(name, f"{value} when guidance_type is 'uncond'")
    if setting.guidance_rescale != 0 and setting.guidance_type != "classifier-free":
        refuse("guidance_rescale", "0 unless guidance_type is 'classifier-free'")
    if setting.guidance_start >= setting.guidance_end:
        refuse("guidance_start", f"below guidance_end, which is {setting.guidance_end:f}")
    if setting.clipping is not None:
        rule = CLIP_RULES.get(setting.sampler)
        if rule is None:
            refuse("clipping", f"null for the sampler {setting.sampler!r}, which does not clip")
        elif ignored := rule.ignores(Clipping.parse(setting.clipping)):
            refuse("clipping", f"without {' and '.join(ignored)}, which the sampler {setting.sampler!r} ignores")
    if setting.eta != 0 and not sampler_facts(setting.sampler).takes_eta:
        refuse("eta", f"0 for the sampler {setting.sampler!r}")


def _settled_for_pipeline(
    spec: dict[str, Any], setting: Setting, default_sampler: str, where: str, is_run: bool
) -> Setting:
    given, takes = setting.model_fields_set, spec["call"]
    for name, only in OF_NETWORKS.items():
        if (value := getattr(setting, name)) != only:
            message = f"{name} is {value}; accepted for a pipeline: {'null' if only is None else only}"
            raise InvalidError(message, (where, name), setting.model_dump(mode="json")[name])
    found: dict[str, Any] = {}
    if setting.num_steps == NOT_GIVEN:
        found["num_steps"] = DEFAULT_NUM_STEPS
    if "sampler" not in given:
        found["sampler"] = default_sampler
    if "guidance_scale" not in takes:
        if getattr(setting, "guidance_scales", None) is not None:
            message = "guidance_scales is given, and this pipeline takes no guidance_scale; accepted: null"
            raise InvalidError(message, (where, "guidance_scales"))
        if setting.guidance_scale != 1:
            message = f"guidance_scale is {setting.guidance_scale}, and this pipeline takes none; accepted: 1"
            raise InvalidError(message, (where, "guidance_scale"), float(setting.guidance_scale))
    elif "guidance_scale" not in given and (default := takes["guidance_scale"].get("default")) is not None:
        found["guidance_scale"] = round(Decimal(str(default)), 6)
    try:
        found["call"] = check_arguments(spec, setting.call, is_complete=is_run)
    except ArgumentError as error:
        raise InvalidError(str(error), (where, "call", error.name), error.value) from None
    found |= _sizes(spec, setting, found["call"], where)
    _check_texts(spec, setting, where)
    complete = setting.model_copy(update=found)
    limit = spec["num_train_timesteps"]
    if limit is not None and complete.num_steps > limit:
        message = f"num_steps is {complete.num_steps}; accepted: 1 to {limit}, the steps this model was trained on"
        raise InvalidError(message, (where, "num_steps"), complete.num_steps)
    _check_pipelines_sampler(spec, complete, where)
    return complete


def _sizes(spec: dict[str, Any], setting: SamplingSetting, call: dict[str, Any], where: str) -> dict[str, int | None]:
    """Height and width: those given, else those of the pipeline's defaults, unless an image may decide them."""
    stand_ins = getattr(setting, "image_sizes", None)
    has_images = bool(image_sizes(call)) or stand_ins is not None
    if stand_ins is not None and (image_sizes(call) or None not in (setting.height, setting.width)):
        message = "image_sizes is given beside images in call, or height and width; accepted: one of these"
        raise InvalidError(message, (where, "image_sizes"), stand_ins)
    if (several := getattr(setting, "sizes", None)) is not None:
        _check_sizes(spec, setting, several, where, has_images=has_images)
        return dict.fromkeys(SIZES)
    multiple = spec.get("size_multiple") or 1
    sizes: dict[str, int | None] = {}
    for name, usual in zip(SIZES, spec["image_shape"][-2:], strict=True):
        value: int | None = getattr(setting, name)
        if name not in spec["call"]:
            if value is not None:
                raise InvalidError(f"{name} is {value}; accepted: null for this pipeline", (where, name), value)
        elif value is None:
            sizes[name] = None if has_images else usual
        elif value % multiple:
            raise InvalidError(f"{name} is {value}; accepted: a multiple of {multiple}", (where, name), value)
    return sizes


def _check_sizes(
    spec: dict[str, Any], setting: SamplingSetting, sizes: list[list[int]], where: str, *, has_images: bool
) -> None:
    """Refuse several sizes beside one, of a pipeline that takes none, or that its decoder cannot make."""
    multiple = spec.get("size_multiple") or 1
    for name in SIZES:
        if (value := getattr(setting, name)) is not None:
            raise InvalidError(f"{name} is {value}; accepted beside sizes: null", (where, name), value)
        if name not in spec["call"]:
            raise InvalidError(f"sizes is given, and this pipeline takes no {name}; accepted: null", (where, "sizes"))
    if has_images:
        raise InvalidError("sizes is given; accepted for a call with an image: null", (where, "sizes"))
    for number, size in enumerate(sizes):
        if any(value % multiple for value in size):
            message = f"sizes[{number}] is {list(size)}; accepted: multiples of {multiple}"
            raise InvalidError(message, (where, "sizes", number), list(size))


def _check_texts(spec: dict[str, Any], setting: SamplingSetting, where: str) -> None:
    """Refuse prompts that the pipeline does not take, or that are missing. No message repeats one."""
    takes_prompt = spec["call"].get("prompt")
    for name in ("prompt", "prompts", "negative_prompt"):
        argument = "negative_prompt" if name == "negative_prompt" else "prompt"
        if getattr(setting, name, None) is not None and argument not in spec["call"]:
            raise InvalidError(f"{name} is given; accepted: null, as this pipeline takes none", (where, name))
    is_needed = takes_prompt is not None and takes_prompt.get("required")
    if is_needed and getattr(setting, "prompt", "") is None:
        raise InvalidError("prompt is missing; accepted: a text", (where, "prompt"))


def _check_pipelines_sampler(spec: dict[str, Any], setting: SamplingSetting, where: str) -> None:
    """Refuse a sampler that cannot take the place of the pipeline's own scheduler. Raises: InvalidError."""
    if setting.sampler == OWN_SAMPLER:
        return
    loc, start = (where, "sampler"), f"sampler is {setting.sampler!r}"
    if (reason := spec.get("tunable")) is not None:
        raise InvalidError(f"{start}; accepted: {OWN_SAMPLER!r} for this pipeline: {reason}", loc, setting.sampler)
    if sampler_facts(setting.sampler).calls_per_step != 1:
        accepted = f"{OWN_SAMPLER!r}, or one that calls the network once per step"
        raise InvalidError(f"{start}; accepted for a pipeline: {accepted}", loc, setting.sampler)


def check_uncond(spec: dict[str, Any], setting: SamplingSetting, accepted: str) -> None:
    """Refuse classifier-free guidance at a scale other than 1 if the model has no condition that stands for none.

    Raises: InvalidError.
    """
    is_guided = setting.guidance_scale != 1 or getattr(setting, "guidance_scales", None) is not None
    needed = setting.guidance_type == "classifier-free" and is_guided
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


def check_room(session: Session, max_queued_jobs: int, owner: str | None) -> None:
    """Refuse a tuning job when too many are waiting, or as many of its key as there is room left for.

    Raises: TooManyRequestsError.
    """
    queued = count_queued(session, TuningJob)
    if queued >= max_queued_jobs:
        raise TooManyRequestsError(f"{queued} jobs are queued; accepted: fewer than {max_queued_jobs}")
    if owner is None:
        return
    own, room = count_queued(session, TuningJob, TuningJob.owner == owner), max_queued_jobs - queued
    if own >= room:
        accepted = f"fewer than the {room} that there is room for"
        raise TooManyRequestsError(f"{own} jobs of this API key are queued; accepted: {accepted}")


def check_webhook(url: str | None, settings: Settings) -> None:
    """Refuse a webhook that would never be called. The dispatcher checks names again when it looks them up.

    Raises: InvalidError.
    """
    if url is None:
        return
    loc = ("body", "webhook_url")
    if not settings.webhook_secret:
        raise InvalidError("webhook_url: the service has no WEBHOOK_SECRET to sign with; accepted: null", loc, url)
    try:
        address = ipaddress.ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return  # The host is a name.
    if not is_allowed(address, settings.webhook_networks):
        raise InvalidError(f"webhook_url leads to {address}; accepted: public addresses", loc, url)
