"""Submitting sampling jobs and shaping their results."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from service.access.callers import ANYBODY, Caller, record_all
from service.access.limits import quota_error
from service.arrays import decode_array, encode_array
from service.errors import InvalidError, NotAcceptableError, NotFoundError, ServiceError, TooLargeError
from service.idempotency import Once
from service.models.logic import get_requested_model
from service.registry.database import Registry
from service.registry.keys import charge
from service.registry.samples import add_samples, changes
from service.registry.tables import JobState, Model, SampleJob, Schedule, Webhook
from service.registry.types import utc_now
from service.requests import check_setting, check_timesteps, check_uncond
from service.samples.formats import FORMATS
from service.samples.schemas import SampleRequest
from service.schedules.logic import find_for_sampling, resolve
from service.settings import Settings
from service.webhooks import check_webhook
from timetuner_core.samplers import get_sampler

REMEMBERED = 10_000  # resolved schedules, before they are forgotten
UNDECIDING = {
    "model",
    "schedule",
    "deadline_seconds",
    "previews",
    "webhook_url",
}  # of the images, as the model and schedule are known


@dataclass(frozen=True)
class Submission:
    """A checked request on its way into the registry.

    Attributes:
        accept: the Accept header of a request that waits for its content; None if it does not.
    """

    job_id: str
    request: SampleRequest
    accept: str | None
    traceparent: str | None = None
    caller: Caller = ANYBODY
    once: Once | None = None


class Catalog:
    """Models and resolved schedules, remembered until the registry says that any of them has changed.

    For one thread at a time. What is remembered belongs to no session: one that is rolled back would take its values.
    """

    def __init__(self) -> None:
        self._changes = -1
        self._models: dict[str, Model] = {}
        self._schedules: dict[str, Schedule | None] = {}

    def refresh(self, session: Session) -> None:
        """Forget what no longer holds; first thing in each transaction."""
        now = changes(session)
        if now != self._changes:
            self._changes = now
            self._models, self._schedules = {}, {}

    def model(self, session: Session, model_id: str) -> Model:
        """Raises: InvalidError."""
        if model_id not in self._models:
            model = get_requested_model(session, model_id)
            session.expunge(model)
            self._models[model_id] = model
        return self._models[model_id]

    def schedule(self, session: Session, request: SampleRequest) -> Schedule | None:
        """Which schedule a request is to be sampled with. Raises: InvalidError."""
        key = str((request.schedule, request.timesteps == "default", request.key()))
        if key not in self._schedules:
            if len(self._schedules) >= REMEMBERED:
                self._schedules = {}
            schedule = _schedule(session, request)
            if schedule is not None:
                session.expunge(schedule)
            self._schedules[key] = schedule
        return self._schedules[key]


def submit_all(
    registry: Registry, settings: Settings, catalog: Catalog, submissions: Sequence[Submission]
) -> list[SampleJob | ServiceError]:
    """Check requests, settle which schedules they use, and store their jobs, all in one transaction.

    What was sampled before is not sampled again: such a job has succeeded at once.

    Returns:
        For each, its job, or why it was refused: InvalidError, TooLargeError, NotAcceptableError, KeyLimitError.
    """
    outcomes: list[SampleJob | ServiceError] = []
    with registry.write() as session:
        catalog.refresh(session)
        for submission in submissions:
            try:
                outcomes.append(_made_before(session, submission) or _make_job(session, settings, catalog, submission))
            except ServiceError as refusal:
                outcomes.append(refusal)
        _reuse(session, [job for _, job in _new(submissions, outcomes)], settings.keep_samples_days)
        _charge(session, catalog, submissions, outcomes)
        new = _new(submissions, outcomes)
        parts = [part for _, job in new for part in _parts(job, settings.sample_batch_size)]
        add_samples(session, [*(job for _, job in new), *parts])
        record_all(session, "sample", [(submission.caller, job.id) for submission, job in new])
        for submission, job in new:
            if submission.once is not None:
                submission.once.remember(session, job.id)
            if url := submission.request.webhook_url:
                session.add(Webhook(sample_job_id=job.id, url=url))
    return outcomes


def _made_before(session: Session, submission: Submission) -> SampleJob | None:
    """The job of the same request, if it came before with the same key. Raises: ConflictError, if it was another."""
    job_id = submission.once and submission.once.found(session)
    return session.get(SampleJob, job_id) if job_id else None


def _new(
    submissions: Sequence[Submission], outcomes: Sequence[SampleJob | ServiceError]
) -> list[tuple[Submission, SampleJob]]:
    """Those that made a job of their own."""
    pairs = zip(submissions, outcomes, strict=True)
    return [(sub, job) for sub, job in pairs if isinstance(job, SampleJob) and job.id == sub.job_id]


def _make_job(session: Session, settings: Settings, catalog: Catalog, submission: Submission) -> SampleJob:
    request = submission.request
    model = catalog.model(session, request.model)
    if submission.accept is not None:
        negotiate(submission.accept, model.spec["image_shape"])
    check_setting(model.spec, request)
    check_timesteps(request.timesteps, request.num_steps, model.spec["T"])
    _check_size(request, model, settings)
    check_webhook(request.webhook_url, settings)
    labels = _class_labels(request, model)
    _check_conditions(request, model)
    if request.uncond_condition is None:
        takes_arrays = model.spec["condition_shape"] is not None
        check_uncond(model.spec, request, "uncond_condition" if takes_arrays else "guidance_scale 1")
    schedule = catalog.schedule(session, request)
    stored = {**request.model_dump(mode="json"), "class_labels": labels}
    deadline, schedule_id = request.deadline_seconds, None if schedule is None else schedule.id
    return SampleJob(
        id=submission.job_id,
        owner=submission.caller.owner,
        model_id=model.id,
        schedule_id=schedule_id,
        request=stored,
        request_hash=_hash(model.id, schedule_id, stored),
        num_images=request.num_images,
        num_parts=0,
        priority=int(submission.accept is None),
        deadline_at=None if deadline is None else utc_now() + timedelta(seconds=deadline),
        traceparent=submission.traceparent,
        request_id=submission.caller.request_id,
    )


def _hash(model_id: str, schedule_id: str | None, request: dict[str, Any]) -> str:
    """Of all that decides the images."""
    deciding = {name: value for name, value in request.items() if name not in UNDECIDING}
    text = json.dumps([model_id, schedule_id, deciding], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# Made once: making a statement takes longer than running it.
_MADE = (
    select(SampleJob.request_hash, SampleJob.artifact, SampleJob.artifact_row)
    .where(
        SampleJob.request_hash.in_(bindparam("hashes", expanding=True)),
        SampleJob.state == JobState.SUCCEEDED,
        SampleJob.finished_at > bindparam("since"),
    )
    .order_by(SampleJob.id)
)


def _reuse(session: Session, jobs: Sequence[SampleJob], keep_days: float) -> None:
    """Give jobs the images that were made for the same request before, but not those about to be deleted."""
    since = utc_now() - timedelta(days=keep_days) if keep_days else datetime.fromtimestamp(0, UTC)
    found = session.connection().execute(_MADE, {"hashes": [job.request_hash for job in jobs], "since": since})
    made = {row.request_hash: row for row in found}
    for job in jobs:
        if job.request_hash in made:
            _, job.artifact, job.artifact_row = made[job.request_hash]
            job.state, job.progress, job.finished_at = JobState.SUCCEEDED, 1.0, utc_now()


def _charge(
    session: Session, catalog: Catalog, submissions: Sequence[Submission], outcomes: list[SampleJob | ServiceError]
) -> None:
    """Count what is to be sampled against the quotas of the keys that have one; put refusals in place of jobs."""
    limited: dict[str, list[int]] = defaultdict(list)
    for i, (submission, outcome) in enumerate(zip(submissions, outcomes, strict=True)):
        key = submission.caller.key
        new = isinstance(outcome, SampleJob) and outcome.id == submission.job_id and outcome.state != JobState.SUCCEEDED
        if new and key is not None and key.pixel_steps_per_day is not None:
            limited[key.id].append(i)
    for key_id, indices in sorted(limited.items()):
        requests = [submissions[i].request for i in indices]
        costs = [_cost(request, catalog.model(session, request.model)) for request in requests]
        for i, cost, left in zip(indices, costs, charge(session, key_id, costs), strict=True):
            key = submissions[i].caller.key
            if left is not None and key is not None:
                outcomes[i] = quota_error(key, cost, left)


def _parts(job: SampleJob, most: int) -> list[SampleJob]:
    """What a job for more images than a worker samples at once is split into."""
    if job.num_images <= most or job.state == JobState.SUCCEEDED:
        return []
    starts = range(0, job.num_images, most)
    job.num_parts = len(starts)
    return [
        SampleJob(
            owner=job.owner,
            model_id=job.model_id,
            schedule_id=job.schedule_id,
            request=_part_of(job.request, first, min(most, job.num_images - first)),
            request_hash="",  # a part is not asked for by itself
            num_images=min(most, job.num_images - first),
            priority=job.priority,
            deadline_at=job.deadline_at,
            parent_id=job.id,
            first_image=first,
            traceparent=job.traceparent,
            request_id=job.request_id,
        )
        for first in starts
    ]


def _part_of(request: dict[str, Any], first: int, count: int) -> dict[str, Any]:
    rows = slice(first, first + count)
    part = {**request, "num_images": count, "seed": request["seed"] + first}
    if request["class_labels"] is not None:
        part["class_labels"] = request["class_labels"][rows]
    if request["condition"] is not None:
        condition = decode_array(request["condition"])
        part["condition"] = encode_array(condition if len(condition) == 1 else condition[rows])
    return part


def get_job(session: Session, caller: Caller, job_id: str, with_for_update: bool = False) -> SampleJob:
    """A job of the caller's. Raises: NotFoundError."""
    job = session.get(SampleJob, job_id, with_for_update=with_for_update)
    if job is None or job.parent_id is not None or not caller.sees(job):
        raise NotFoundError(f"no sampling job {job_id!r}")
    return job


def _check_size(request: SampleRequest, model: Model, settings: Settings) -> None:
    if request.num_images > settings.max_images:
        message = f"num_images is {request.num_images}; accepted: 1 to {settings.max_images}"
        raise InvalidError(message, ("body", "num_images"), request.num_images)
    cost = _cost(request, model)
    if cost > settings.max_pixel_steps:
        detail = f"values x steps x images x network calls is {cost}; accepted: up to {settings.max_pixel_steps}"
        raise TooLargeError(detail, ("body", "num_images"), request.num_images)


def _cost(request: SampleRequest, model: Model) -> int:
    """Values x steps x images x network calls."""
    pixels: int = max(math.prod(model.spec["sample_shape"]), math.prod(model.spec["image_shape"]))
    calls = get_sampler(request.sampler).calls_per_step * (2 if request.guidance_type == "classifier-free" else 1)
    return pixels * request.num_steps * request.num_images * calls


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
