"""Submitting, reading and cancelling tuning jobs."""

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, joinedload, selectinload

from service.access.callers import Caller
from service.access.idempotency import Once, make_once
from service.access.visibility import is_seen_job
from service.http.errors import ConflictError, InvalidError, NotFoundError, TooLargeError
from service.http.fields import PageQuery, newest_first
from service.registry.database import Registry
from service.registry.jobs import request_cancel
from service.registry.tables import FINAL_STATES, JobState, TuningJob, TuningJobEvent, Webhook
from service.registry.types import utc_now
from service.request_checks import (
    check_room,
    check_timesteps,
    check_uncond,
    check_webhook,
    get_requested_model,
    settled,
)
from service.shared.job_requests import TuningJobRequest
from service.shared.pipeline_calls import is_pipeline
from service.shared.sampler_facts import sampler_facts
from service.shared.settings import Settings
from service.tuning_jobs.pipelines import DEFAULT_SAMPLER, check_pipeline_job, check_tunable
from timetuner_core.catalog import NAMED_GRIDS
from timetuner_core.tuners import (
    EVALUATED_SCALES,
    MAX_KL_SAMPLES,
    MAX_START_SAMPLES,
    MAX_WORTH_SAMPLES,
    TEACHER_CHECK_RUNS,
    TEACHER_CHECK_SAMPLES,
    TUNERS,
    WORTH_STEP_FACTORS,
    OptionError,
    TunedSetting,
    in_whole_batches,
)


def submit(
    registry: Registry, settings: Settings, caller: Caller, request: TuningJobRequest, idempotency_key: str | None
) -> tuple[TuningJob, bool]:
    """Check a request and store its job, or find the job that the same request with this key made before.

    Returns:
        The job, and whether it was made now.

    Raises:
        InvalidError, TooLargeError: the request does not fit the model, or is too much work.
        TooManyRequestsError: too many jobs are waiting.
        KeyLimitError: the job costs more than is left of the API key's quota.
        ConflictError: the key was used with another request.
    """
    once = Once.of(caller, "submit_tuning_job", idempotency_key, request.model_dump_json())

    def find(session: Session, job_id: str) -> TuningJob:
        return get_job(session, caller, job_id)

    def make(session: Session) -> TuningJob:
        job, _, charged = add_job(session, settings, caller, request)
        caller.charge(session, charged)
        caller.record(session, "submit_tuning_job", job.id)
        return job

    return make_once(registry, once, find, make)


def add_job(
    session: Session, settings: Settings, caller: Caller, request: TuningJobRequest, **columns: str
) -> tuple[TuningJob, int, int]:
    """Check a request and add its job, which may have an `id` and a `group_id` that were chosen before.

    Returns:
        The job, the samples that it puts through the network at most, and what these are charged as.

    Raises:
        InvalidError, TooLargeError, TooManyRequestsError.
    """
    check_room(session, settings.max_queued_jobs, caller.owner)
    model = get_requested_model(session, caller, request.model)
    complete, calls, values = _checked(request, model.spec, settings)
    caller.private_to(request.private)
    check_webhook(request.webhook_url, settings)
    job = TuningJob(
        owner=caller.owner,
        model_id=model.id,
        request=complete.model_dump(mode="json"),
        request_id=caller.request_id,
        schedule=None,
        **columns,
    )
    session.add(job)
    session.flush()
    if request.webhook_url:
        session.add(Webhook(tuning_job_id=job.id, url=request.webhook_url))
    session.add(TuningJobEvent(job_id=job.id, type="queued", data={}))
    return job, calls, calls * values


def price(request: TuningJobRequest, spec: dict[str, Any], settings: Settings) -> int:
    """The samples that a request puts through the network, at most. Raises: InvalidError, TooLargeError."""
    return _checked(request, spec, settings)[1]


def get_job(session: Session, caller: Caller, job_id: str, *, lock: bool = False) -> TuningJob:
    """A job that the caller sees. `lock` locks its row until the transaction ends. Raises: NotFoundError."""
    options = [selectinload(TuningJob.steps), joinedload(TuningJob.schedule)]
    job = session.get(TuningJob, job_id, options=options, with_for_update={"of": TuningJob} if lock else None)
    if job is None or not caller.sees(job):
        raise NotFoundError(f"no tuning job {job_id!r}; accepted: an id that GET /v1/tuning-jobs lists")
    return job


def newest(
    session: Session, caller: Caller, state: JobState | None, page: PageQuery, model_id: str | None = None
) -> tuple[Sequence[TuningJob], str | None]:
    """One page of the jobs the caller sees, of one model if it is given, newest first, and the cursor of the next."""
    query = select(TuningJob).options(joinedload(TuningJob.schedule)).where(is_seen_job(caller, TuningJob))
    if state is not None:
        query = query.where(TuningJob.state == state)
    if model_id is not None:
        query = query.where(TuningJob.model_id == model_id)
    return newest_first(session, query, TuningJob.id, page)


def cancel(registry: Registry, caller: Caller, job_id: str) -> TuningJob:
    """Cancel a job that is not over. Raises: NotFoundError, ConflictError."""
    with registry.write() as session:
        job = get_job(session, caller, job_id, lock=True)
        if job.state in FINAL_STATES and job.state != JobState.CANCELLED:
            raise ConflictError(f"tuning job {job_id!r} has {job.state}; accepted: one that is queued or running")
        request_cancel(session, job)
        caller.record(session, "cancel_tuning_job", job_id)
        return job


def events_after(session: Session, job_id: str, last_id: int, limit: int = 1000) -> Sequence[TuningJobEvent]:
    """The job's events later than `last_id`, oldest first."""
    query = select(TuningJobEvent).where(TuningJobEvent.job_id == job_id, TuningJobEvent.id > last_id)
    return session.scalars(query.order_by(TuningJobEvent.id).limit(limit)).all()


def progress_of(session: Session, job: TuningJob) -> dict[str, Any]:
    """The phases of a job's latest attempt, and its times, as `TuningJobDetail` has them."""
    found: dict[str, Any] = {}
    now = utc_now()
    if job.started_at is not None:
        found["elapsed_seconds"] = ((job.finished_at or now) - job.started_at).total_seconds()
    events = select(TuningJobEvent).where(TuningJobEvent.job_id == job.id, TuningJobEvent.type == "progress")
    event = session.scalars(events.order_by(TuningJobEvent.id.desc()).limit(1)).first()
    if event is None or "phases" not in event.data:  # A version before this one has no phases.
        return found
    found |= {"phase": event.data["phase"], "phases": event.data["phases"]}
    remaining = event.data["remaining_seconds"]
    if job.state == JobState.RUNNING and remaining is not None:
        found["remaining_seconds"] = max(0.0, remaining - (now - event.created_at).total_seconds())
    return found


def _checked(request: TuningJobRequest, spec: dict[str, Any], settings: Settings) -> tuple[TuningJobRequest, int, int]:
    """The request as it is stored, the samples that it puts through the network at most, and the values of each.

    Raises:
        InvalidError, TooLargeError.
    """
    check_tunable(request, spec)
    complete = settled(spec, request, DEFAULT_SAMPLER)
    if is_pipeline(spec):
        return check_pipeline_job(complete, spec, settings)
    _check(complete, spec)
    return complete, _check_size(complete, spec, settings), math.prod(spec["sample_shape"])


def _check(request: TuningJobRequest, spec: dict[str, Any]) -> None:
    check_timesteps(request.timesteps, request.num_steps, spec["T"])
    if request.guidance_type != "uncond" and not spec["has_conditions"]:
        message = "no conditions came with this model; accepted: an archive whose data.safetensors has 'conditions'"
        raise InvalidError(message, ("body", "guidance_type"), request.guidance_type)
    check_uncond(spec, request, "guidance_scale 1")
    _check_noise(request)
    _check_interval(request)
    tuner, setting = request.tuner, _setting(request, spec)
    try:
        tuner.check(setting)
    except OptionError as error:
        raise InvalidError(f"tuner.{error}", ("body", "tuner", error.name), error.value) from error
    teachers = {"evaluation": request.evaluation.teacher_num_steps, "tuner": tuner.teacher_steps(setting)}
    most = spec["num_train_timesteps"]
    for part, teacher_num_steps in teachers.items():
        if teacher_num_steps and teacher_num_steps <= request.num_steps and request.num_steps != most:
            message = f"{part}.teacher_num_steps is {teacher_num_steps}; accepted: more than num_steps"
            raise InvalidError(message, ("body", part, "teacher_num_steps"), teacher_num_steps)


def _check_noise(request: TuningJobRequest) -> None:
    """Refuse tuners that match a teacher's result if the sampler adds noise, which makes another result each time."""
    if not request.tuner.matches_results:
        return
    *names, last = (repr(name) for name, tuner in TUNERS.items() if not tuner.matches_results)
    sampler, accepted = sampler_facts(request.sampler), f"{', '.join(names)} or {last}"
    if sampler.stochastic:
        message = f"sampler is {request.sampler!r}, which adds noise; accepted: tuner.objective {accepted}"
        raise InvalidError(message, ("body", "sampler"), request.sampler)
    if request.eta != 0:
        message = f"eta is {request.eta}; accepted: 0, or tuner.objective {accepted}"
        raise InvalidError(message, ("body", "eta"), float(request.eta))


def _check_interval(request: TuningJobRequest) -> None:
    """Refuse tuners that guide all samples alike, for an interval of guidance scales."""
    scales, objective = request.guidance_scales, request.tuner.objective
    if scales is None or request.tuner.takes_guidance_interval:
        return
    *names, last = (
        repr(name) for name, tuner in TUNERS.items() if tuner.takes_guidance_interval and name != "pipeline"
    )
    message = f"tuner.objective is {objective!r}, with guidance_scales; accepted: {', '.join(names)} or {last}"
    raise InvalidError(message, ("body", "tuner", "objective"), objective)


def _setting(request: TuningJobRequest, spec: dict[str, Any]) -> TunedSetting:
    sampler = sampler_facts(request.sampler)
    timesteps_given = request.timesteps != "default"
    return TunedSetting(
        request.num_steps, sampler.calls_per_step, sampler.history_length, spec["has_data"], timesteps_given
    )


def _check_size(request: TuningJobRequest, spec: dict[str, Any], settings: Settings) -> int:
    """Samples put through the network, at most. Refuses more memory or work than is allowed. Raises: TooLargeError."""
    tuner, setting = request.tuner, _setting(request, spec)
    guided = 2 if request.guidance_type == "classifier-free" else 1
    values = math.prod(spec["sample_shape"]) * tuner.samples_at_once(setting) * guided
    if values > settings.max_tuning_batch_values:
        detail = f"tuning holds {values} values at once; accepted: {settings.max_tuning_batch_values}"
        raise TooLargeError(detail, ("body", "tuner", "batch_size"), getattr(tuner, "batch_size", None))
    batch_size = getattr(tuner, "batch_size", 1)
    population = in_whole_batches(getattr(tuner, "population_size", 0), batch_size)
    steps = population * (tuner.teacher_steps(setting) or 0)
    steps += min(population, in_whole_batches(MAX_START_SAMPLES, batch_size)) * tuner.max_starts * request.num_steps
    steps += _evaluation_steps(request) * (1 if request.guidance_scales is None else EVALUATED_SCALES)
    calls = guided * (setting.calls_per_step * steps + tuner.network_samples(setting))
    if calls > settings.max_tuning_calls:
        detail = f"the job puts {calls} samples through the network; accepted: {settings.max_tuning_calls}"
        total_iters = getattr(tuner, "total_iters", None)
        where = ("body", "tuner") if total_iters is None else ("body", "tuner", "total_iters")
        raise TooLargeError(detail, where, total_iters)
    return calls


def _evaluation_steps(request: TuningJobRequest) -> int:
    """Steps of single samples at most, to check the teacher and to evaluate the result at one guidance scale."""
    evaluation, num_steps = request.evaluation, request.num_steps
    # Besides the teacher's, four kinds of samples are made: tuned ones, and untuned ones on the default time grid, on
    # diffusers' own and on the best named one.
    steps = evaluation.most_samples * (evaluation.teacher_num_steps + 4 * num_steps)
    # The untuned sampler is tried on all named grids, and on the best one with more steps.
    untuned = sum(math.ceil(factor * num_steps) for factor in WORTH_STEP_FACTORS)
    untuned += len(NAMED_GRIDS) * num_steps
    steps += untuned * min(MAX_WORTH_SAMPLES, evaluation.num_samples)
    steps += 2 * MAX_KL_SAMPLES * num_steps
    return steps + TEACHER_CHECK_SAMPLES * TEACHER_CHECK_RUNS * evaluation.teacher_num_steps
