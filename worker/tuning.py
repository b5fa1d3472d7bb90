"""Running a tuning job: tune from wherever the last attempt got to, evaluate, store the schedule."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from sqlalchemy.orm import Session
from torch import Tensor

from service.registry.jobs import add_event, finish
from service.registry.schedules import next_version
from service.registry.tables import Evaluation as EvaluationRow
from service.registry.tables import JobState, Schedule, ScheduleStatus, TuningJob, TuningJobStep
from timetuner_core import evaluation, tuning
from timetuner_core.generation import generate
from timetuner_core.grids import make_timesteps, teacher_timesteps
from timetuner_core.loading import DiffusionModel
from timetuner_core.samplers import get_sampler, initial_noise
from worker.lease import Lease
from worker.requests import guidance_of, timesteps_of
from worker.runtime import Runtime

TUNING_SHARE = 0.8  # of the progress bar; evaluation has the rest

# Seeds of the noise that tuning and evaluation see: two ranges that neither meet each other nor, being
# above 2**31, the seeds of users' samples.
TUNING_SEEDS = 2**31
EVALUATION_SEEDS = 2**31 + 2**30
SEED_RANGE = 2**29


class TuningRun:
    """One attempt at one job."""

    def __init__(self, runtime: Runtime, lease: Lease) -> None:
        with runtime.registry.read() as session:
            self.job = session.get_one(TuningJob, lease.claim.job_id)
            self.state = _load_state(self.job)
        self.lease = lease
        self.save_seconds = runtime.settings.save_seconds
        self.device = runtime.device
        self.request = self.job.request
        self.tuner = self.request["tuner"]
        self.guidance = guidance_of(self.request)
        self.sampler = get_sampler(self.request["sampler"])
        self.network_calls = 0
        self.model = self._counted(runtime.load_model(self.job.model_id))
        self.timesteps = timesteps_of(self.request, self.model.noise_schedule)
        self.seconds = 0.0

    def run(self) -> None:
        """Tune, evaluate, store."""
        self._tune()
        result = self._evaluate()
        self._store(result)

    def _tune(self) -> None:
        states = self._states()
        saved = started = time.monotonic()
        for _ in states:
            self.lease.check()
            if time.monotonic() - saved > self.save_seconds:
                saved = self._save(started)
                started = saved
        self._save(started)

    def _states(self) -> Iterator[tuning.TuningState]:
        tuner = self.tuner
        if tuner["objective"] == "end_to_end":
            condition = self._conditions(tuner["population_size"], TUNING_SEEDS)
            seeds = self._seeds(tuner["population_size"], TUNING_SEEDS)
            noise, _ = initial_noise(
                self.model.sample_shape, seeds, self.model.noise_schedule.starting_std(self.timesteps[0])
            )
            problem = self._problem(noise, condition)
            teacher = self._teacher_timesteps(tuner["teacher_num_steps"])
            return tuning.tune_end_to_end(problem, self.state, teacher, tuner["lr"], tuner["total_iters"])
        problem = self._problem(*self._data())
        return tuning.tune_next_eps(problem, self.state, tuner["tune_type"], tuner["lr"], tuner["total_iters"])

    def _problem(self, population: Tensor, condition: Tensor | None) -> tuning.TuningProblem:
        model_fn = self.guidance.model_fn(self.model)
        condition = None if condition is None else condition.to(self.device)
        conditions = self.model.conditions(self.guidance.type, condition)
        step_kwargs = {"uncond_condition": conditions["uncond_condition"], "eta": self.request["eta"]}
        return tuning.TuningProblem(
            model_fn,
            self.model.noise_schedule,
            self.sampler.step_fn(model_fn, self.model.noise_schedule),
            self.timesteps,
            population.to(self.device),
            conditions["condition"],
            batch_size=self.tuner["batch_size"],
            seed=self.request["seed"],
            step_kwargs={name: value for name, value in step_kwargs.items() if value is not None},
        )

    def _data(self) -> tuple[Tensor, Tensor | None]:
        """x0 and condition for the published objective: the model's data, or else the teacher's samples."""
        size = self.tuner["population_size"]
        if self.model.draw_data is not None and self.tuner["data"] != "generated":
            x0, condition = self.model.draw_data(size, torch.Generator().manual_seed(self.request["seed"]))
            return x0, condition if self.guidance.type != "uncond" else None
        condition = self._conditions(size, TUNING_SEEDS)
        timesteps = self._teacher_timesteps(self.tuner["teacher_num_steps"])
        return self._teach(self._seeds(size, TUNING_SEEDS), condition, timesteps, decode=False), condition

    def _evaluate(self) -> evaluation.Evaluation:
        settings = self.request["evaluation"]
        seeds = self._seeds(settings["num_samples"], EVALUATION_SEEDS)
        condition = self._conditions(settings["num_samples"], EVALUATION_SEEDS)

        def sample(timesteps: Tensor, t_ratios: Tensor | None) -> Tensor:
            return self._generate(seeds, condition, self.sampler.name, timesteps, t_ratios, self.request["eta"]).cpu()

        teacher_timesteps = self._teacher_timesteps(settings["teacher_num_steps"])
        return evaluation.evaluate(
            sample,
            self.timesteps,
            self.state.t_ratios,
            self._teach(seeds, condition, teacher_timesteps).cpu(),
            self.model.reference,
            # What `auto` would sample with if this schedule were not there, whatever grid it was tuned on.
            untuned_timesteps=make_timesteps(self.model.noise_schedule, self.request["num_steps"]),
        )

    def _teach(self, seeds: list[int], condition: Tensor | None, timesteps: Tensor, decode: bool = True) -> Tensor:
        """A many-step teacher's samples: the same sampler without noise, or DDIM for those that always add it."""
        name = "ddim" if self.sampler.stochastic else self.sampler.name
        return self._generate(seeds, condition, name, timesteps, None, 0.0, decode)

    def _store(self, result: evaluation.Evaluation) -> None:
        """Schedule, evaluation and the job's end, in one transaction."""
        with self.lease.write() as (session, job):
            assert isinstance(job, TuningJob)
            schedule = self._schedule_row(session, result)
            session.add(schedule)
            session.flush()
            session.add(self._evaluation_row(schedule.id, job, result))
            add_event(session, job, "evaluated", schedule=schedule.id, status=str(schedule.status), score=result.score)
            finish(session, job, JobState.SUCCEEDED)

    def _schedule_row(self, session: Session, result: evaluation.Evaluation) -> Schedule:
        key = {name: self.request[name] for name in Schedule.KEY if name != "model_id"} | {
            "model_id": self.job.model_id
        }
        return Schedule(
            **key,
            job_id=self.job.id,
            version=next_version(session, key),
            status=ScheduleStatus.ACCEPTED if result.better else ScheduleStatus.REJECTED,
            score=result.score,
            timesteps=self.timesteps.tolist(),
            t_ratios=self.state.t_ratios.tolist(),
            provenance={"tuner": self.tuner, "seed": self.request["seed"], "timetuner": version("timetuner")},
        )

    def _evaluation_row(self, schedule_id: str, job: TuningJob, result: evaluation.Evaluation) -> EvaluationRow:
        settings = self.request["evaluation"]
        return EvaluationRow(
            schedule_id=schedule_id,
            num_samples=settings["num_samples"],
            teacher_num_steps=len(self._teacher_timesteps(settings["teacher_num_steps"])) - 1,
            seed=self.request["seed"],
            teacher_l2_before=result.teacher_l2_before,
            teacher_l2_after=result.teacher_l2_after,
            teacher_l2_change_low=result.change.low,
            teacher_l2_change_high=result.change.high,
            frechet_before=result.frechet_before,
            frechet_after=result.frechet_after,
            wall_time_seconds=job.tuning_seconds,
            network_calls=job.network_calls,
        )

    def _save(self, since: float) -> float:
        """Write the tuner's state, so that another worker could go on from here; returns the time now."""
        now = time.monotonic()
        done = float(self.state.iterations.sum()) / (self.request["num_steps"] * self.tuner["total_iters"])
        with self.lease.write() as (session, job):
            assert isinstance(job, TuningJob)
            for row in _step_rows(self.job.id, self.state):
                session.merge(row)
            job.progress = TUNING_SHARE * min(done, 1.0)
            job.network_calls += self.network_calls
            job.tuning_seconds += now - since
            losses = self.state.loss[~self.state.loss.isnan()]
            event: dict[str, Any] = {"progress": job.progress, "t_ratios": self.state.t_ratios.tolist()}
            if len(losses):
                event["loss"] = float(losses.sum())
            add_event(session, job, "progress", **event)
        self.network_calls = 0
        return now

    def _generate(
        self,
        seeds: list[int],
        condition: Tensor | None,
        sampler: str,
        timesteps: Tensor,
        t_ratios: Tensor | None,
        eta: float,
        decode: bool = True,
    ) -> Tensor:
        batch_size = self.request["evaluation"]["batch_size"]
        return generate(
            self.model,
            self.guidance,
            seeds,
            condition,
            timesteps,
            t_ratios,
            eta,
            sampler=sampler,
            decode=decode,
            batch_size=batch_size,
            device=self.device,
            after_step=self.lease.check,
        )

    def _teacher_timesteps(self, num_steps: int) -> Tensor:
        return teacher_timesteps(self.model.noise_schedule, num_steps)

    def _seeds(self, count: int, base: int) -> list[int]:
        start = base + self.request["seed"] % SEED_RANGE
        return list(range(start, start + count))

    def _conditions(self, count: int, base: int) -> Tensor | None:
        """Conditions drawn for guided sampling: classes uniformly, tensors from the model's own."""
        if self.guidance.type == "uncond":
            return None
        assert self.model.draw_conditions is not None  # the service refuses guidance without
        generator = torch.Generator().manual_seed(base + self.request["seed"] % SEED_RANGE)
        return self.model.draw_conditions(count, generator)

    def _counted(self, model: DiffusionModel) -> DiffusionModel:
        """The model, its network counting the samples put through it."""
        network: Callable[..., Tensor] = model.network

        def counting(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.network_calls += len(x)
            return network(x, *args, **kwargs)

        return dataclasses.replace(model, network=counting)


def run_tuning_job(runtime: Runtime, lease: Lease) -> None:
    """Run a tuning job to its end."""
    TuningRun(runtime, lease).run()


def _load_state(job: TuningJob) -> tuning.TuningState:
    """What the last attempt saved, or the start."""
    state = tuning.TuningState.start(job.request["num_steps"])
    for row in job.steps:
        i = row.step_index
        state.t_ratios[i], state.iterations[i] = row.t_ratio, row.iterations
        state.exp_avg[i], state.exp_avg_sq[i] = row.exp_avg, row.exp_avg_sq
        state.loss[i] = math.nan if row.loss is None else row.loss
        state.initial_loss[i] = math.nan if row.initial_loss is None else row.initial_loss
    return state


def _step_rows(job_id: str, state: tuning.TuningState) -> Iterator[TuningJobStep]:
    for i in range(len(state.t_ratios)):
        loss, initial_loss = float(state.loss[i]), float(state.initial_loss[i])
        yield TuningJobStep(
            job_id=job_id,
            step_index=i,
            t_ratio=float(state.t_ratios[i]),
            iterations=int(state.iterations[i]),
            exp_avg=float(state.exp_avg[i]),
            exp_avg_sq=float(state.exp_avg_sq[i]),
            loss=None if math.isnan(loss) else loss,
            initial_loss=None if math.isnan(initial_loss) else initial_loss,
        )
