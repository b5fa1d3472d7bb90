"""Submitting, reading and cancelling tuning jobs."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, joinedload, selectinload

from service.errors import ConflictError, InvalidError, NotFoundError, TooLargeError
from service.models.logic import get_requested_model
from service.registry.database import Registry
from service.registry.jobs import add_event, request_cancel
from service.registry.tables import FINAL_STATES, JobState, TuningJob, TuningJobEvent
from service.requests import check_room, check_setting, check_timesteps, check_uncond
from service.settings import Settings
from service.tuning_jobs.schemas import NextEpsTuner, TuningJobRequest
from timetuner_core.samplers import get_sampler


def submit(
    registry: Registry, settings: Settings, request: TuningJobRequest, idempotency_key: str | None
) -> tuple[TuningJob, bool]:
    """Make a job, or find the one made before with this key; and whether it was made now.

    Raises:
        InvalidError, TooLargeError: the request does not fit the model, or is too much work.
        TooManyRequestsError: too many jobs are waiting.
        ConflictError: the key was used with another request.
    """
    text = request.model_dump_json()
    request_hash = hashlib.sha256(text.encode()).hexdigest()
    if idempotency_key and (job := _submitted_before(registry, idempotency_key, request_hash)):
        return job, False
    check_room(registry, TuningJob, settings.max_queued_jobs)
    try:
        with registry.write() as session:
            model = get_requested_model(session, request.model)
            _check(request, model.spec)
            _check_size(request, model.spec, settings)
            job = TuningJob(
                model_id=model.id,
                request=request.model_dump(mode="json"),
                idempotency_key=idempotency_key,
                request_hash=request_hash,
                schedule=None,
            )
            session.add(job)
            session.flush()
            add_event(session, job, "queued")
            return job, True
    except IntegrityError:  # the same key, at the same time
        if idempotency_key and (found := _submitted_before(registry, idempotency_key, request_hash)):
            return found, False
        raise


def get_job(session: Session, job_id: str, *, lock: bool = False) -> TuningJob:
    """The job; `lock` keeps others from changing it until the transaction ends. Raises: NotFoundError."""
    options = [selectinload(TuningJob.steps), joinedload(TuningJob.schedule)]
    job = session.get(TuningJob, job_id, options=options, with_for_update={"of": TuningJob} if lock else None)
    if job is None:
        raise NotFoundError(f"no tuning job {job_id!r}")
    return job


def cancel(registry: Registry, job_id: str) -> TuningJob:
    """Cancel a job that is not over. Raises: NotFoundError, ConflictError."""
    with registry.write() as session:
        job = get_job(session, job_id, lock=True)
        if job.state in FINAL_STATES and job.state != JobState.CANCELLED:
            raise ConflictError(f"tuning job {job_id!r} has {job.state}; accepted: one that is queued or running")
        request_cancel(session, job)
        return job


def events_after(session: Session, job_id: str, last_id: int, limit: int = 1000) -> Sequence[TuningJobEvent]:
    """The job's events later than `last_id`, oldest first."""
    query = select(TuningJobEvent).where(TuningJobEvent.job_id == job_id, TuningJobEvent.id > last_id)
    return session.scalars(query.order_by(TuningJobEvent.id).limit(limit)).all()


def _check(request: TuningJobRequest, spec: dict[str, Any]) -> None:
    check_setting(spec, request)
    check_timesteps(request.timesteps, request.num_steps, spec["T"])
    if request.guidance_type != "uncond" and not spec["has_conditions"]:
        message = "no conditions came with this model; accepted: an archive whose data.safetensors has 'conditions'"
        raise InvalidError(message, ("body", "guidance_type"), request.guidance_type)
    check_uncond(spec, request, "guidance_scale 1")
    sampler, tuner = get_sampler(request.sampler), request.tuner
    if isinstance(tuner, NextEpsTuner):
        if tuner.data == "model" and not spec["has_data"]:
            message = "tuner.data is 'model'; accepted: 'generated' or 'auto', as no data came with this model"
            raise InvalidError(message, ("body", "tuner", "data"), tuner.data)
        if tuner.tune_type == "parallel" and sampler.history_length:
            message = "tuner.tune_type is 'parallel'; accepted for a multistep sampler: 'sequential'"
            raise InvalidError(message, ("body", "tuner", "tune_type"), tuner.tune_type)
    elif sampler.stochastic:
        message = f"sampler is {sampler.name!r}, which adds noise; accepted: tuner.objective 'next_eps'"
        raise InvalidError(message, ("body", "sampler"), sampler.name)
    elif request.eta != 0:
        message = f"eta is {request.eta}; accepted: 0 for the objective 'end_to_end', else choose 'next_eps'"
        raise InvalidError(message, ("body", "eta"), float(request.eta))
    teachers = {"tuner": tuner.teacher_num_steps, "evaluation": request.evaluation.teacher_num_steps}
    most = spec["num_train_timesteps"]
    for part, teacher_num_steps in teachers.items():
        if teacher_num_steps <= request.num_steps and request.num_steps != most:
            message = f"{part}.teacher_num_steps is {teacher_num_steps}; accepted: more than num_steps"
            raise InvalidError(message, ("body", part, "teacher_num_steps"), teacher_num_steps)


def _check_size(request: TuningJobRequest, spec: dict[str, Any], settings: Settings) -> None:
    """Refuse more memory or work than is allowed. Raises: TooLargeError."""
    tuner, evaluation = request.tuner, request.evaluation
    guided = 2 if request.guidance_type == "classifier-free" else 1
    in_parallel = isinstance(tuner, NextEpsTuner) and tuner.tune_type == "parallel"
    steps_at_once = request.num_steps if in_parallel else 1
    values = math.prod(spec["sample_shape"]) * tuner.batch_size * steps_at_once * guided
    if values > settings.max_tuning_batch_values:
        detail = f"an iteration's network batch has {values} values; accepted: {settings.max_tuning_batch_values}"
        raise TooLargeError(detail, ("body", "tuner", "batch_size"), tuner.batch_size)
    calls_per_step = get_sampler(request.sampler).calls_per_step * guided
    tuning = 2 * tuner.batch_size * tuner.total_iters * request.num_steps
    teaching = tuner.population_size * tuner.teacher_num_steps
    evaluating = evaluation.num_samples * (evaluation.teacher_num_steps + 2 * request.num_steps)
    calls = calls_per_step * (tuning + teaching + evaluating)
    if calls > settings.max_tuning_calls:
        detail = f"the job puts {calls} samples through the network; accepted: {settings.max_tuning_calls}"
        raise TooLargeError(detail, ("body", "tuner", "total_iters"), tuner.total_iters)


def _submitted_before(registry: Registry, idempotency_key: str, request_hash: str) -> TuningJob | None:
    with registry.read() as session:
        query = select(TuningJob).where(TuningJob.idempotency_key == idempotency_key)
        job = session.scalar(query.options(joinedload(TuningJob.schedule)))
    if job is not None and job.request_hash != request_hash:
        message = "this Idempotency-Key was used with another request; accepted: a new key, or the same request"
        raise ConflictError(message, ("header", "Idempotency-Key"), idempotency_key)
    return job
