"""Submitting, reading and cancelling tuning jobs."""

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, joinedload, selectinload

from service.access.callers import Caller
from service.access.idempotency import Once, make_once
from service.access.limits import quota_error
from service.http.errors import ConflictError, InvalidError, NotFoundError, TooLargeError
from service.http.fields import PageQuery, newest_first
from service.models.logic import get_requested_model
from service.registry.database import Registry
from service.registry.jobs import add_event, request_cancel
from service.registry.keys import Scope, charge
from service.registry.tables import FINAL_STATES, JobState, TuningJob, TuningJobEvent, Webhook
from service.setting_checks import check_room, check_setting, check_timesteps, check_uncond
from service.shared.sampler_facts import sampler_facts
from service.shared.settings import Settings
from service.shared.tuning_request import (
    AysTuner,
    DataTuner,
    EndToEndTuner,
    GitsTuner,
    PerStepTuner,
    TeacherStepTuner,
    TuningJobRequest,
)
from service.webhook_check import check_webhook


def submit(
    registry: Registry, settings: Settings, caller: Caller, request: TuningJobRequest, idempotency_key: str | None
) -> tuple[TuningJob, bool]:
    """Make a job, or find the one made before with this key; and whether it was made now.

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
        check_room(session, TuningJob, settings.max_queued_jobs)
        model = get_requested_model(session, request.model)
        _check(request, model.spec)
        calls = _check_size(request, model.spec, settings)
        check_webhook(request.webhook_url, settings)
        _charge(session, caller, calls * math.prod(model.spec["sample_shape"]))
        job = TuningJob(
            owner=caller.owner,
            model_id=model.id,
            request=request.model_dump(mode="json"),
            request_id=caller.request_id,
            schedule=None,
        )
        session.add(job)
        session.flush()
        if request.webhook_url:
            session.add(Webhook(tuning_job_id=job.id, url=request.webhook_url))
        add_event(session, job, "queued")
        caller.record(session, "submit_tuning_job", job.id)
        return job

    return make_once(registry, once, find, make)


def get_job(session: Session, caller: Caller, job_id: str, *, lock: bool = False) -> TuningJob:
    """A job of the caller's; `lock` keeps others from changing it until the transaction ends. Raises: NotFoundError."""
    options = [selectinload(TuningJob.steps), joinedload(TuningJob.schedule)]
    job = session.get(TuningJob, job_id, options=options, with_for_update={"of": TuningJob} if lock else None)
    if job is None or not caller.sees(job):
        raise NotFoundError(f"no tuning job {job_id!r}")
    return job


def newest(
    session: Session, caller: Caller, state: JobState | None, page: PageQuery
) -> tuple[Sequence[TuningJob], str | None]:
    """One page of the jobs the caller sees, newest first, and the cursor of the next."""
    query = select(TuningJob).options(joinedload(TuningJob.schedule))
    if not caller.may(Scope.ADMIN):
        query = query.where(TuningJob.owner == caller.owner)
    if state is not None:
        query = query.where(TuningJob.state == state)
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


def _check(request: TuningJobRequest, spec: dict[str, Any]) -> None:
    check_setting(spec, request)
    check_timesteps(request.timesteps, request.num_steps, spec["T"])
    if request.guidance_type != "uncond" and not spec["has_conditions"]:
        message = "no conditions came with this model; accepted: an archive whose data.safetensors has 'conditions'"
        raise InvalidError(message, ("body", "guidance_type"), request.guidance_type)
    check_uncond(spec, request, "guidance_scale 1")
    _check_noise(request)
    _check_tuner(request, spec)
    teachers = {"evaluation": request.evaluation.teacher_num_steps, "tuner": _tuners_teacher(request, spec)}
    most = spec["num_train_timesteps"]
    for part, teacher_num_steps in teachers.items():
        if teacher_num_steps and teacher_num_steps <= request.num_steps and request.num_steps != most:
            message = f"{part}.teacher_num_steps is {teacher_num_steps}; accepted: more than num_steps"
            raise InvalidError(message, ("body", part, "teacher_num_steps"), teacher_num_steps)


def _check_noise(request: TuningJobRequest) -> None:
    """Refuse to match a result, of all steps or of one, that noise makes another each time."""
    if not isinstance(request.tuner, EndToEndTuner | TeacherStepTuner):
        return
    sampler, accepted = sampler_facts(request.sampler), "'next_eps', 'ays', 'gits', 'dmn' or 'grid'"
    if sampler.stochastic:
        message = f"sampler is {request.sampler!r}, which adds noise; accepted: tuner.objective {accepted}"
        raise InvalidError(message, ("body", "sampler"), request.sampler)
    if request.eta != 0:
        message = f"eta is {request.eta}; accepted: 0, or tuner.objective {accepted}"
        raise InvalidError(message, ("body", "eta"), float(request.eta))


def _check_tuner(request: TuningJobRequest, spec: dict[str, Any]) -> None:
    tuner = request.tuner

    def refuse(name: str, accepted: str) -> None:
        value = getattr(tuner, name)
        raise InvalidError(f"tuner.{name} is {value!r}; accepted: {accepted}", ("body", "tuner", name), value)

    if isinstance(tuner, DataTuner) and tuner.data == "model" and not spec["has_data"]:
        refuse("data", "'generated' or 'auto', as no data came with this model")
    if isinstance(tuner, PerStepTuner):
        if tuner.tune_type == "parallel" and sampler_facts(request.sampler).history_length:
            refuse("tune_type", "for a multistep sampler 'sequential'")
        if tuner.optimizer == "adam" and tuner.tolerance is not None:
            refuse("tolerance", "null, or the optimizer 'gauss_newton'")
        if tuner.optimizer == "gauss_newton" and tuner.lr is not None:
            refuse("lr", "null, or the optimizer 'adam'")
    if isinstance(tuner, EndToEndTuner) and tuner.start == "best" and request.timesteps != "default":
        refuse("start", "'given' where timesteps are given")
    num_candidates = getattr(tuner, "num_candidates", None)
    if num_candidates is not None and num_candidates <= request.num_steps:
        refuse("num_candidates", f"null, or more than num_steps, which is {request.num_steps}")


def _tuners_teacher(request: TuningJobRequest, spec: dict[str, Any]) -> int | None:
    """The steps of the tuner's own teacher, if it has one to follow or to make its data."""
    tuner = request.tuner
    if isinstance(tuner, EndToEndTuner):
        return tuner.teacher_num_steps
    generates = isinstance(tuner, DataTuner) and (tuner.data == "generated" or not spec["has_data"])
    return tuner.teacher_num_steps if isinstance(tuner, DataTuner) and generates else None


def _check_size(request: TuningJobRequest, spec: dict[str, Any], settings: Settings) -> int:
    """Samples put through the network, at most. Refuses more memory or work than is allowed. Raises: TooLargeError."""
    tuner, evaluation = request.tuner, request.evaluation
    guided = 2 if request.guidance_type == "classifier-free" else 1
    values = math.prod(spec["sample_shape"]) * _samples_at_once(request) * guided
    if values > settings.max_tuning_batch_values:
        detail = f"tuning holds {values} values at once; accepted: {settings.max_tuning_batch_values}"
        raise TooLargeError(detail, ("body", "tuner", "batch_size"), getattr(tuner, "batch_size", None))
    calls_per_step = sampler_facts(request.sampler).calls_per_step
    teaching = getattr(tuner, "population_size", 0) * (_tuners_teacher(request, spec) or 0)
    evaluating = evaluation.num_samples * (evaluation.teacher_num_steps + 2 * request.num_steps)
    calls = guided * (calls_per_step * (teaching + evaluating) + _tuning_calls(request, calls_per_step))
    if calls > settings.max_tuning_calls:
        detail = f"the job puts {calls} samples through the network; accepted: {settings.max_tuning_calls}"
        total_iters = getattr(tuner, "total_iters", None)
        where = ("body", "tuner") if total_iters is None else ("body", "tuner", "total_iters")
        raise TooLargeError(detail, where, total_iters)
    return calls


def _charge(session: Session, caller: Caller, cost: int) -> None:
    """Count a job against its key's quota, if that has one. Raises: KeyLimitError."""
    if caller.key is not None and caller.key.pixel_steps_per_day is not None:
        (left,) = charge(session, caller.key.id, [cost])
        if left is not None:
            raise quota_error(caller.key, cost, left)


def _samples_at_once(request: TuningJobRequest) -> int:
    """Samples that are in memory together: of a network batch, or of a grid search's candidates."""
    tuner = request.tuner
    if isinstance(tuner, PerStepTuner):
        in_one_batch = tuner.tune_type == "parallel" and not tuner.spread
        return tuner.batch_size * (request.num_steps if in_one_batch else 1)
    if isinstance(tuner, AysTuner | GitsTuner):
        return tuner.batch_size * _num_candidates(tuner, request.num_steps)
    return tuner.batch_size if isinstance(tuner, EndToEndTuner) else 0


def _tuning_calls(request: TuningJobRequest, calls_per_step: int) -> int:
    """Samples put through the network, guidance not counted, if no step is tuned before `total_iters`."""
    tuner, num_steps = request.tuner, request.num_steps
    if isinstance(tuner, EndToEndTuner):
        return 2 * tuner.batch_size * tuner.total_iters * num_steps * calls_per_step  # twice: steps are recomputed
    if isinstance(tuner, PerStepTuner):
        target, residual = 1, calls_per_step + 1  # the network once more, where the step ends
        if isinstance(tuner, TeacherStepTuner):
            target, residual = tuner.substeps * calls_per_step, calls_per_step
        if tuner.optimizer == "gauss_newton":
            residual *= 2
        carrying = tuner.population_size * calls_per_step if tuner.tune_type == "sequential" else 0
        return num_steps * (tuner.batch_size * (tuner.total_iters or 0) * (target + residual) + carrying)
    if isinstance(tuner, AysTuner | GitsTuner):
        size = tuner.num_samples if isinstance(tuner, AysTuner) else tuner.population_size
        return _num_candidates(tuner, num_steps) * math.ceil(size / tuner.batch_size) * tuner.batch_size
    return 0


def _num_candidates(tuner: AysTuner | GitsTuner, num_steps: int) -> int:
    return tuner.num_candidates or max(61 if isinstance(tuner, GitsTuner) else 40, 4 * num_steps)
