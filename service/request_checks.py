"""Checks that tuning and sampling requests share: the model, the setting, the queue and the webhook they name."""

import ipaddress
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy.orm import Session

from service.access.callers import Caller
from service.access.visibility import visible_model, visible_models, visible_registration
from service.http.errors import InvalidError, TooManyRequestsError
from service.registry.jobs import count_queued
from service.registry.models import why_not_ready
from service.registry.tables import Model, TuningJob
from service.shared.addresses import is_allowed
from service.shared.job_requests import ALWAYS, SamplingSetting, Timesteps
from service.shared.sampler_facts import sampler_facts
from service.shared.settings import Settings
from timetuner_core.clipping import CLIP_RULES, Clipping


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


def check_uncond(spec: dict[str, Any], setting: SamplingSetting, accepted: str) -> None:
    """Refuse classifier-free guidance at a scale other than 1 if the model has no condition that stands for none.

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
