"""Submitting sampling jobs: checks, prices and stores many requests in one transaction."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeGuard

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from service.access.callers import ANYBODY, Caller, quota_error, record_all
from service.access.idempotency import Once
from service.http.errors import ServiceError, StoreFullError
from service.registry.database import Registry
from service.registry.keys import charge
from service.registry.samples import add_samples
from service.registry.stored_bytes import quota_text, stored_bytes
from service.registry.tables import JobState, Model, SampleJob, Schedule, Webhook
from service.registry.types import utc_now
from service.request_checks import OF_PIPELINES, check_uncond, check_webhook, settled
from service.samples.catalog import Catalog
from service.samples.checks import (
    check_class_labels,
    check_conditions,
    check_fields_of_networks,
    check_grid,
    check_size,
    shape_of,
)
from service.samples.content import negotiate
from service.samples.parts import split_into_parts
from service.shared.artifacts import bytes_of_rows
from service.shared.job_requests import OWN_SAMPLER, SampleRequest
from service.shared.pipeline_calls import is_pipeline
from service.shared.settings import Settings

# Fields that do not affect the images. The ids of the model and the schedule enter the hash beside the request.
NOT_HASHED = {"model", "schedule", "deadline_seconds", "previews", "webhook_url"}


class Cost(NamedTuple):
    """A job's share of its key's quota, and of the store."""

    pixel_steps: int
    stored_bytes: int


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


def submit_all(
    registry: Registry, settings: Settings, catalog: Catalog, submissions: Sequence[Submission]
) -> list[SampleJob | ServiceError]:
    """Check requests, resolve the schedules they use, and store their jobs, all in one transaction.

    Images that were sampled before are reused: such a job succeeds at once.

    Returns:
        For each request its job, or its refusal: InvalidError, TooLargeError, NotAcceptableError, KeyLimitError,
        StoreFullError.
    """
    outcomes: list[SampleJob | ServiceError] = []
    costs: dict[str, Cost] = {}
    with registry.write() as session:
        catalog.refresh(session)
        for submission in submissions:
            try:
                job = _made_before(session, submission)
                if job is None:
                    job, costs[submission.job_id] = _make_job(session, settings, catalog, submission)
                outcomes.append(job)
            except ServiceError as refusal:
                outcomes.append(refusal)
        _reuse(session, [job for _, job in _new(submissions, outcomes)], settings.keep_samples_days)
        _check_room(session, settings, costs, submissions, outcomes)
        _charge(session, costs, submissions, outcomes)
        new = _new(submissions, outcomes)
        parts = [part for _, job in new for part in split_into_parts(job, settings.part_size)]
        add_samples(session, [*(job for _, job in new), *parts])
        record_all(session, "sample", [(submission.caller, job.id) for submission, job in new])
        for submission, job in new:
            if submission.once is not None:
                submission.once.remember(session, job.id)
            if url := submission.request.webhook_url:
                session.add(Webhook(sample_job_id=job.id, url=url))
    return outcomes


def _made_before(session: Session, submission: Submission) -> SampleJob | None:
    """The job that a request with the same key made before. Raises: ConflictError, if that request was another."""
    if submission.once is None or (job_id := submission.once.found(session)) is None:
        return None
    job = session.get(SampleJob, job_id)
    if job is None:  # Its samples were deleted early, to make room.
        submission.once.forget(session)
    return job


def _new(
    submissions: Sequence[Submission], outcomes: Sequence[SampleJob | ServiceError]
) -> list[tuple[Submission, SampleJob]]:
    """The submissions that made a new job, with their jobs."""
    pairs = zip(submissions, outcomes, strict=True)
    return [(sub, job) for sub, job in pairs if _is_new(job, sub)]


def _is_new(outcome: SampleJob | ServiceError, submission: Submission) -> TypeGuard[SampleJob]:
    """Whether the outcome is a new job that the submission made."""
    return isinstance(outcome, SampleJob) and outcome.id == submission.job_id


def _make_job(session: Session, settings: Settings, catalog: Catalog, submission: Submission) -> tuple[SampleJob, Cost]:
    """A request's job, and what it costs."""
    given = submission.request
    model = catalog.model(session, submission.caller, given.model)
    request = settled(model.spec, given, OWN_SAMPLER)
    shape = shape_of(request, model)
    if submission.accept is not None:
        negotiate(submission.accept, shape)
    check_grid(request, model)
    pixel_steps = check_size(request, model, shape, settings)
    check_webhook(request.webhook_url, settings)
    check_fields_of_networks(request, model)
    labels = check_class_labels(request, model)
    check_conditions(request, model)
    if request.uncond_condition is None:
        takes_arrays = model.spec["condition_shape"] is not None
        check_uncond(model.spec, request, "uncond_condition" if takes_arrays else "guidance_scale 1")
    schedule = catalog.schedule(session, submission.caller, request)
    stored = request.model_copy(update={"class_labels": labels}).model_dump(mode="json")
    deadline, schedule_id = request.deadline_seconds, None if schedule is None else schedule.id
    dtype = _dtype(settings, model, schedule)
    job = SampleJob(
        id=submission.job_id,
        owner=submission.caller.owner,
        model_id=model.id,
        schedule_id=schedule_id,
        request=stored,
        request_hash=_hash(model.id, schedule_id, stored, dtype),
        dtype=dtype,
        num_images=request.num_images,
        num_parts=0,
        priority=int(submission.accept is None),
        deadline_at=None if deadline is None else utc_now() + timedelta(seconds=deadline),
        traceparent=submission.traceparent,
        request_id=submission.caller.request_id,
    )
    return job, Cost(pixel_steps, _stored_size(request.num_images, math.prod(shape), settings.part_size))


def _stored_size(num_images: int, values: int, part_size: int) -> int:
    """The bytes that a job's images take in the store. Parts are kept beside the file that they are joined in."""
    return bytes_of_rows(num_images, 4 * values) * (1 if num_images <= part_size else 2)


def _dtype(settings: Settings, model: Model, schedule: Schedule | None) -> str | None:
    """The precision that a network samples in: that of its schedule, unless all is to be in float32.

    None for a pipeline, which has its own.
    """
    if is_pipeline(model.spec):
        return None
    return "float32" if schedule is None or settings.dtype == "float32" else schedule.dtype


def _hash(model_id: str, schedule_id: str | None, request: dict[str, Any], dtype: str | None = None) -> str:
    """A hash of all that decides the images.

    Requests for networks in float32 have the hashes they had before pipelines and other precisions came.
    """
    deciding = {
        name: value
        for name, value in request.items()
        if name not in NOT_HASHED and not (name in OF_PIPELINES and value == OF_PIPELINES[name])
    }
    precision = [] if dtype in (None, "float32") else [dtype]
    text = json.dumps([model_id, schedule_id, deciding, *precision], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# The newest job of each hash that has its images. The statement is made once: making it takes longer than running it.
_NEWEST = (
    select(func.max(SampleJob.id))
    .where(
        SampleJob.request_hash.in_(bindparam("hashes", expanding=True)),
        SampleJob.state == JobState.SUCCEEDED,
        SampleJob.finished_at > bindparam("since"),
    )
    .group_by(SampleJob.request_hash)
)
_MADE = select(SampleJob.request_hash, SampleJob.artifact, SampleJob.artifact_row, SampleJob.flagged).where(
    SampleJob.id.in_(_NEWEST)
)


def _reuse(session: Session, jobs: Sequence[SampleJob], keep_days: float) -> None:
    """Give jobs the images that the same request made before, unless these are due to be deleted."""
    since = utc_now() - timedelta(days=keep_days) if keep_days else datetime.fromtimestamp(0, UTC)
    found = session.connection().execute(_MADE, {"hashes": [job.request_hash for job in jobs], "since": since})
    made = {row.request_hash: row for row in found}
    for job in jobs:
        if job.request_hash in made:
            _, job.artifact, job.artifact_row, job.flagged = made[job.request_hash]
            job.state, job.progress, job.finished_at = JobState.SUCCEEDED, 1.0, utc_now()


def _check_room(
    session: Session,
    settings: Settings,
    cost_of: Mapping[str, Cost],
    submissions: Sequence[Submission],
    outcomes: list[SampleJob | ServiceError],
) -> None:
    """Replace new jobs by their refusals whose images have no room in the store. Workers count them when they store."""
    most = settings.max_stored_bytes
    if not most:
        return
    stored = stored_bytes(session)
    for i, (submission, job) in enumerate(zip(submissions, outcomes, strict=True)):
        if _is_new(job, submission) and job.state != JobState.SUCCEEDED:
            needed = cost_of[job.id].stored_bytes
            if stored + needed <= most:
                stored += needed
            else:
                outcomes[i] = StoreFullError(quota_text(stored, needed, most), ("body", "num_images"), job.num_images)


def _charge(
    session: Session,
    cost_of: Mapping[str, Cost],
    submissions: Sequence[Submission],
    outcomes: list[SampleJob | ServiceError],
) -> None:
    """Count new jobs against the quotas of their keys. A job that does not fit is replaced by its refusal."""
    limited: dict[str, list[int]] = defaultdict(list)
    for i, (submission, outcome) in enumerate(zip(submissions, outcomes, strict=True)):
        key = submission.caller.key
        is_to_run = _is_new(outcome, submission) and outcome.state != JobState.SUCCEEDED
        if is_to_run and key is not None and key.pixel_steps_per_day is not None:
            limited[key.id].append(i)
    for key_id, indices in sorted(limited.items()):
        costs = [cost_of[submissions[i].job_id].pixel_steps for i in indices]
        for i, cost, left in zip(indices, costs, charge(session, key_id, costs), strict=True):
            key = submissions[i].caller.key
            if left is not None and key is not None:
                outcomes[i] = quota_error(key, cost, left)
