"""Running a tuning job: tune from the last saved state, evaluate, store the schedule."""

import dataclasses
import math
from functools import partial
from importlib.metadata import version
from typing import Any

from sqlalchemy.orm import Session

from service.registry.jobs import add_event, finish
from service.registry.schedules import next_version
from service.registry.tables import PUBLIC, EvaluationRow, JobState, Schedule, ScheduleStatus, TuningJob
from service.shared.job_requests import TuningJobRequest
from service.shared.telemetry import TRACER
from timetuner_core.evaluation.verdict import Evaluation, Metric
from timetuner_core.grids import teacher_timesteps
from timetuner_core.tuners import PipelineTuner
from timetuner_core.tuning.problem import TuningState
from worker.lease import Lease
from worker.pipeline_tuning import run_pipeline_job
from worker.runtime import Runtime
from worker.tuned_sampler import TunedSampler
from worker.tuning_state import load_state, read_job, store_progress, tune
from worker.tuning_tasks import tune_by_tasks


def run_tuning_job(runtime: Runtime, lease: Lease) -> None:
    """Run a tuning job to its end."""
    with runtime.registry.read() as session:
        job = read_job(session, lease.claim.job_id)
    if isinstance(TuningJobRequest.stored(job.request).tuner, PipelineTuner):
        run_pipeline_job(runtime, lease, job)
        return
    sampler = TunedSampler(runtime, job, lease, checks_teacher=True)
    state = load_state(job, sampler.timesteps)
    sampler.progress.store = partial(store_progress, lease.write)
    if not bool(state.iterations.any()):  # An attempt that continues has a teacher that was checked.
        with TRACER.start_as_current_span("check_teacher"):
            sampler.check_teacher()
    with TRACER.start_as_current_span("tune"):
        if sampler.tuner.is_spread:
            state = tune_by_tasks(runtime, lease, sampler)
        else:
            tune(sampler, state, lease, lease.write, runtime.settings.save_seconds)
    sampler.progress.store = partial(store_progress, lease.write)
    sampler.progress.enter("evaluation")
    with TRACER.start_as_current_span("evaluate"):
        evaluation, precision = sampler.evaluate(state)
    with TRACER.start_as_current_span("store"):
        lease.persist(lambda: _store(lease, sampler, state, evaluation, precision))


def _store(
    lease: Lease, sampler: TunedSampler, state: TuningState, result: Evaluation, precision: dict[str, Any]
) -> None:
    """Store the schedule, its evaluation and the job's end in one transaction."""
    with lease.write() as (session, job):
        assert isinstance(job, TuningJob)
        schedule = _schedule_row(session, job, sampler.request, state, result, precision)
        session.add(schedule)
        session.flush()
        session.add(_evaluation_row(schedule.id, job, sampler, result))
        score = result.score if math.isfinite(result.score) else None
        add_event(session, job, "evaluated", schedule=schedule.id, status=str(schedule.status), score=score)
        finish(session, job, JobState.SUCCEEDED)


def _schedule_row(
    session: Session,
    job: TuningJob,
    request: TuningJobRequest,
    state: TuningState,
    result: Evaluation,
    precision: dict[str, Any],
) -> Schedule:
    """The schedule of a job. Args: precision: what its provenance says of that: see `TunedSampler.evaluate`."""
    key = request.key()
    private_to = (job.owner or PUBLIC) if request.private else PUBLIC
    return Schedule(
        **key,
        job_id=job.id,
        owner=job.owner,
        private_to=private_to,
        version=next_version(session, key, private_to),
        status=ScheduleStatus.ACCEPTED if result.better else ScheduleStatus.REJECTED,
        score=_no_nan(result.score),
        timesteps=state.timesteps.tolist(),
        t_ratios=state.t_ratios.tolist(),
        solver_table=None if state.solver_table is None else state.solver_table.to_dict(),
        provenance={
            "tuner": dataclasses.asdict(request.tuner),
            "seed": request.seed,
            "timetuner": version("timetuner"),
            **precision,
        },
    )


def _evaluation_row(schedule_id: str, job: TuningJob, sampler: TunedSampler, result: Evaluation) -> EvaluationRow:
    request = sampler.request
    teacher = teacher_timesteps(sampler.experiment.model.noise_schedule, request.evaluation.teacher_num_steps)
    return EvaluationRow(
        schedule_id=schedule_id,
        num_samples=result.num_samples,
        teacher_num_steps=len(teacher) - 1,
        seed=request.seed,
        teacher_l2_before=_no_nan(result.teacher_l2_before),
        teacher_l2_after=_no_nan(result.teacher_l2_after),
        teacher_l2_change_low=_no_nan(result.change.low),
        teacher_l2_change_high=_no_nan(result.change.high),
        frechet_before=result.frechet_before,
        frechet_after=result.frechet_after,
        metrics={name: _metric(metric) for name, metric in result.metrics.items()},
        verdict=result.verdict,
        reason=result.reason,
        worth=_worth(result),
        best_untuned=_best_untuned(result),
        guidance_scale=result.guidance_scale,
        at_scales=[_at_scale(scale, each) for scale, each in result.at_scales.items()] or None,
        wall_time_seconds=job.tuning_seconds,
        network_calls=job.network_calls,
    )


def _at_scale(scale: float, result: Evaluation) -> dict[str, Any]:
    """The evaluation at one guidance scale of an interval, as the API tells it."""
    return {
        "guidance_scale": scale,
        "verdict": result.verdict,
        "reason": result.reason,
        "score": result.score if math.isfinite(result.score) else None,
        "num_samples": result.num_samples,
        "metrics": {name: _metric(metric) for name, metric in result.metrics.items()},
        "worth": _worth(result),
        "best_untuned": _best_untuned(result),
    }


def _worth(result: Evaluation) -> dict[str, Any] | None:
    return None if result.worth is None else result.worth.to_dict()


def _best_untuned(result: Evaluation) -> dict[str, Any] | None:
    """The best untuned choice, as the API tells it. Numbers that are not finite are null."""
    best = result.best_untuned
    if best is None:
        return None
    figures = {
        "teacher_l2": best.teacher_l2,
        "change": best.change.mean,
        "low": best.change.low,
        "high": best.change.high,
    }
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return {"sampler": best.sampler, "grid": best.grid, **finite}


def _no_nan(value: float) -> float:
    """Replace NaN by infinity, because SQLite stores NaN as null."""
    return math.inf if math.isnan(value) else value


def _metric(metric: Metric) -> dict[str, float | None]:
    """A metric as it is stored. JSON has no number that is not finite, so these are null."""
    change = metric.change
    figures: dict[str, float | None] = {"before": metric.before, "after": metric.after, "change": change.mean}
    figures |= {"low": change.low, "high": change.high, "stock": metric.stock, "teacher": metric.teacher}
    return {name: None if value is None or not math.isfinite(value) else value for name, value in figures.items()}
