"""Checks of tuning and sampling requests against the model they name."""

from decimal import Decimal
from typing import Any

from service.errors import InvalidError, TooManyRequestsError
from service.registry.database import Registry
from service.registry.jobs import count_queued
from service.registry.tables import Job


def check_sampling(
    spec: dict[str, Any], num_steps: int, guidance_type: str, guidance_scale: Decimal, where: str = "body"
) -> None:
    """Refuse step counts and guidance that the model does not have. Raises: InvalidError."""
    limit = spec["num_train_timesteps"]
    if limit is not None and num_steps > limit:
        message = f"num_steps is {num_steps}; accepted: 1 to {limit}, the steps this model was trained on"
        raise InvalidError(message, (where, "num_steps"), num_steps)
    if guidance_type not in spec["guidance_types"]:
        accepted = ", ".join(spec["guidance_types"]) or "none"
        message = f"guidance_type is {guidance_type!r}; accepted for this model: {accepted}"
        raise InvalidError(message, (where, "guidance_type"), guidance_type)
    if guidance_type == "uncond" and guidance_scale != 1:
        message = f"guidance_scale is {guidance_scale}; accepted: 1 when guidance_type is 'uncond'"
        raise InvalidError(message, (where, "guidance_scale"), float(guidance_scale))


def check_room(registry: Registry, job_class: type[Job], max_queued_jobs: int) -> None:
    """Refuse a job when too many are waiting. Raises: TooManyRequestsError."""
    with registry.read() as session:
        queued = count_queued(session, job_class)
    if queued >= max_queued_jobs:
        raise TooManyRequestsError(f"{queued} jobs are queued; accepted: fewer than {max_queued_jobs}")
