"""Running a tuning job on a whole pipeline: `tune_pipeline` from the last saved state, and the schedule it found."""

import dataclasses
import hashlib
import logging
import math
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service.registry.database import is_away
from service.registry.jobs import add_event, finish
from service.registry.schedules import next_version
from service.registry.tables import (
    PUBLIC,
    EvaluationRow,
    JobState,
    Schedule,
    ScheduleStatus,
    TuningJob,
    TuningJobStep,
)
from service.shared.job_requests import TuningJobRequest
from service.shared.pipeline_calls import SIZES
from timetuner_core.pipelines.prompts import check_prompt_lengths
from timetuner_core.tuners import PipelineTuner
from worker.lease import JobRefusedError, Lease, WorkerStoppingError
from worker.metrics import TUNING_ITERATIONS
from worker.pipeline_sampling import ServedPipeline, call_of
from worker.runtime import Runtime

if TYPE_CHECKING:
    from timetuner_core.pipelines.runs import Progress
    from timetuner_core.pipelines.schedule import PipelineSchedule
    from timetuner_core.pipelines.tuning import PipelineState

logger = logging.getLogger(__name__)


def run_pipeline_job(runtime: Runtime, lease: Lease, job: TuningJob) -> None:
    """Run a tuning job on a pipeline to its end.

    Raises:
        JobRefusedError: a prompt that is too long.
        the errors of `Lease.check`.
    """
    # These import diffusers, which takes seconds. A worker without pipelines does without.
    from timetuner_core.pipelines.checks import read_prompts, takes_prompts
    from timetuner_core.pipelines.tuning import PipelineState, tune_pipeline

    request = TuningJobRequest.stored(job.request)
    tuner, evaluation = request.tuner, request.evaluation
    served = runtime.load(job.model_id)
    assert isinstance(served, ServedPipeline)
    assert isinstance(tuner, PipelineTuner)
    call = call_of(request, served)
    call.pop("output_type", None)  # The tuner compares latents.
    if request.guidance_scales is not None:
        call["guidance_scale"] = list(map(float, request.guidance_scales))
    if request.sizes is not None:
        call |= dict(zip(SIZES, map(list, zip(*request.sizes, strict=True)), strict=True))
    prompts = read_prompts(request.prompts) if takes_prompts(served.pipeline) else None
    for prompt in prompts or []:
        try:
            check_prompt_lengths(served.pipeline, {**call, "prompt": prompt})
        except ValueError as error:
            raise JobRefusedError(str(error)) from None
    state = None if job.pipeline_state is None else PipelineState.from_dict(job.pipeline_state)
    attempt = _Attempt(runtime, lease, job.model_id, tuner.total_iters)
    try:
        schedule = tune_pipeline(
            served.pipeline,
            prompts,
            request.num_steps,
            call.pop("guidance_scale", None),
            sampler=request.sampler,
            teacher_num_steps=evaluation.teacher_num_steps,
            total_iters=tuner.total_iters,
            num_samples=tuner.num_samples,
            num_held_out=evaluation.num_samples,
            seed=request.seed,
            max_batch=tuner.max_batch,
            on_progress=attempt.note,
            is_cancelled=attempt.check,
            on_state=attempt.keep,
            state=state,
            **call,
        )
    except WorkerStoppingError:
        attempt.save()
        raise
    lease.persist(attempt.save)
    lease.persist(lambda: _store(lease, request, schedule, prompts))


class _Attempt:
    """One attempt at a job: its progress and its newest state, which are stored about every `save_seconds`."""

    def __init__(self, runtime: Runtime, lease: Lease, model_id: str, total_iters: int) -> None:
        self._runtime, self._lease = runtime, lease
        self._iterations = TUNING_ITERATIONS.labels(model_id)
        self._total_iters = total_iters
        self._progress: Progress | None = None
        self._state: PipelineState | None = None  # It is not stored yet.
        self._rows = 0  # The rows that are stored.
        self._noted = 0, 0  # The calls and rows that the meter has.
        lease.meter.start()
        self._began = self._saved = time.monotonic()

    def note(self, progress: "Progress") -> None:
        """Take notice of a step, and store what is due."""
        self._progress = progress
        calls, rows = self._noted
        self._lease.meter.count(progress.num_rows - rows, progress.num_calls - calls)
        self._noted = progress.num_calls, progress.num_rows
        if time.monotonic() - self._saved > self._runtime.settings.save_seconds:
            try:
                self.save()
            except DBAPIError as error:
                if not is_away(error):
                    raise
                logger.warning("the database is away; to be saved later: %s", error.orig)

    def check(self) -> bool:
        """Let urgent samples go first. Raises: the errors of `Lease.check`."""
        self._lease.check()
        with self._lease.watch.paused(), self._lease.meter.paused():  # Samples are watched and charged by themselves.
            self._runtime.give_way()
        return False

    def keep(self, state: "PipelineState") -> None:
        """Take a state that is to be stored."""
        self._iterations.inc()
        self._state = state

    def save(self) -> None:
        """Store the progress, and the state if there is a new one."""
        now, progress = time.monotonic(), self._progress
        with self._lease.write() as (session, job):
            assert isinstance(job, TuningJob)
            event: dict[str, Any] = {}
            if self._state is not None:
                event = self._store_state(session, job, self._state)
            if progress is not None:
                job.progress = max(job.progress, progress.done / max(progress.total, 1))
                event = {"progress": job.progress, **event, **self._described(progress)}
                job.network_calls += progress.num_rows - self._rows
                if progress.phase != "evaluation":
                    job.tuning_seconds += now - self._saved
            if event:
                add_event(session, job, "progress", **event)
        self._saved, self._state = now, None
        self._rows = self._rows if progress is None else progress.num_rows

    def _store_state(self, session: Session, job: TuningJob, state: "PipelineState") -> dict[str, Any]:
        """Enter a state, and give what its event says."""
        job.pipeline_state = state.to_dict()
        job.timesteps = state.timesteps
        job.losses = 0
        for i, t_ratio in enumerate(state.t_ratios):
            step = TuningJobStep(job_id=job.id, step_index=i, t_ratio=t_ratio, iterations=state.iterations)
            step.memory, step.done = [], state.iterations >= self._total_iters
            session.merge(step)
        return {"t_ratios": state.t_ratios, "loss": state.losses[-1]}

    def _described(self, progress: "Progress") -> dict[str, Any]:
        """The progress as an event of the job holds it."""
        phases = [{"name": name, "done": done, "total": total} for name, (done, total) in progress.phases.items()]
        share = progress.done / max(progress.total, 1)
        remaining = (time.monotonic() - self._began) * (1 - share) / share if phases and share else None
        return {"phase": progress.phase, "phases": phases, "remaining_seconds": remaining}


def _store(lease: Lease, request: TuningJobRequest, found: "PipelineSchedule", prompts: list[str] | None) -> None:
    """Store the schedule, its evaluation and the job's end in one transaction."""
    with lease.write() as (session, job):
        assert isinstance(job, TuningJob)
        schedule = _schedule_row(session, job, request, found, prompts)
        session.add(schedule)
        session.flush()
        session.add(_evaluation_row(schedule.id, job, request, found.evaluation))
        add_event(
            session,
            job,
            "evaluated",
            schedule=schedule.id,
            status=str(schedule.status),
            score=found.evaluation["score"],
        )
        finish(session, job, JobState.SUCCEEDED)


def _schedule_row(
    session: Session, job: TuningJob, request: TuningJobRequest, found: "PipelineSchedule", prompts: list[str] | None
) -> Schedule:
    key = request.key()
    private_to = (job.owner or PUBLIC) if request.private else PUBLIC
    evaluation = found.evaluation
    score = evaluation["score"]
    return Schedule(
        **key,
        job_id=job.id,
        owner=job.owner,
        private_to=private_to,
        version=next_version(session, key, private_to),
        status=ScheduleStatus.ACCEPTED if evaluation["better"] else ScheduleStatus.REJECTED,
        score=float("inf") if score is None else score,
        timesteps=found.timesteps,
        t_ratios=found.t_ratios,
        solver_table=found.solver_table,
        call=request.deciding() or None,
        provenance={
            "tuner": dataclasses.asdict(request.tuner),
            "seed": request.seed,
            "timetuner": version("timetuner"),
            "prompts": _digest_of(prompts, is_ours=request.prompts is None),
            "key": _without_content(found.key),
            "compared_with": evaluation["compared_with"],
            "distances": {name: _or_none(distance) for name, distance in evaluation["distances"].items()},
        },
    )


def _digest_of(prompts: list[str] | None, *, is_ours: bool) -> dict[str, Any] | None:
    """A digest that tells prompts apart without repeating them: others may see the schedule."""
    if prompts is None:
        return None
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return {"count": len(prompts), "sha256": digest, "default": is_ours}


def _without_content(key: dict[str, Any]) -> dict[str, Any]:
    """A schedule's key without texts of the call, which others may not see."""
    call = {name: value for name, value in key["call"].items() if not isinstance(value, str | list)}
    return key | {"call": call}


def _evaluation_row(
    schedule_id: str, job: TuningJob, request: TuningJobRequest, evaluation: dict[str, Any]
) -> EvaluationRow:
    metric, change = evaluation["metrics"]["teacher_l2"], evaluation["metrics"]["teacher_l2"]["change"]
    return EvaluationRow(
        schedule_id=schedule_id,
        num_samples=evaluation["num_samples"],
        teacher_num_steps=evaluation["teacher_num_steps"],
        seed=request.seed,
        teacher_l2_before=_finite(metric["before"]),
        teacher_l2_after=_finite(metric["after"]),
        teacher_l2_change_low=_finite(change["low"]),
        teacher_l2_change_high=_finite(change["high"]),
        frechet_before=None,
        frechet_after=None,
        metrics=_metrics(evaluation),
        verdict=evaluation["verdict"],
        reason=evaluation["reason"],
        guidance_scale=evaluation.get("guidance_scale"),
        at_scales=[_at_scale(each) for each in evaluation.get("at_scales", [])] or None,
        wall_time_seconds=job.tuning_seconds,
        network_calls=job.network_calls,
    )


def _at_scale(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The evaluation at one guidance scale of an interval, as the API tells it."""
    names = ("guidance_scale", "verdict", "reason", "score", "num_samples")
    return {name: evaluation[name] for name in names} | {"metrics": _metrics(evaluation)}


def _metrics(evaluation: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The distance to the teacher, against the better rival and against each of them."""
    metric, change = evaluation["metrics"]["teacher_l2"], evaluation["metrics"]["teacher_l2"]["change"]
    distances = {name: _or_none(distance) for name, distance in evaluation["distances"].items()}
    after = metric["after"]
    figures = {"before": metric["before"], "after": after, "change": change["mean"]}
    figures |= {"low": change["low"], "high": change["high"], "stock": distances.get("native"), "teacher": None}
    metrics = {"teacher_l2": figures}
    for name in ("native", "untuned"):
        if (before := distances.get(name)) is not None:
            difference = {"before": before, "after": after, "low": None, "high": None}
            difference["change"] = None if after is None else after - before
            metrics[f"teacher_l2_{name}"] = difference | {"stock": None, "teacher": None}
    return metrics


def _or_none(value: float) -> float | None:
    """A figure as JSON takes it."""
    return value if math.isfinite(value) else None


def _finite(value: float | None) -> float:
    """A figure that is not finite is stored as infinity."""
    return float("inf") if value is None else value
