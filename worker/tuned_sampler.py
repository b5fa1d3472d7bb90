"""A tuning job on this worker: its model, its sampler, and the tuner that improves it."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch

from service.registry.tables import TuningJob
from service.shared.job_requests import TuningJobRequest
from timetuner_core.evaluation.teacher_check import TeacherError
from timetuner_core.evaluation.verdict import Evaluation
from timetuner_core.evaluation.worth import UntunedCurve
from timetuner_core.models.loading import DiffusionModel
from timetuner_core.models.tensors import dtype_name
from timetuner_core.samplers import get_sampler
from timetuner_core.tuners import DataTuner
from timetuner_core.tuning.problem import TuningProblem, TuningState
from timetuner_core.tuning_setup import Experiment, HeldOut
from worker.conversion import guidance_of, guidance_scales_of, timesteps_of
from worker.lease import JobRefusedError, Lease
from worker.runtime import Runtime
from worker.tuning_progress import TuningProgress, phases_of
from worker.untuned_curves import keep_curve, known_curves

logger = logging.getLogger(__name__)


class TunedSampler:
    """One attempt at a tuning job, or at a task of it.

    Attributes:
        timesteps: the grid to start from, `(num_steps + 1,)`.
        network_calls: samples put through the network since they were last stored.
        progress: how far the job is, by the network calls of this attempt.
    """

    def __init__(self, runtime: Runtime, job: TuningJob, lease: Lease, *, checks_teacher: bool = False) -> None:
        """The lease is checked before every network call, and its meter counts them.

        With `checks_teacher`, the calls of `check_teacher` are a part of the progress.
        """
        self.runtime = runtime
        self.job_id, self.model_id = job.id, job.model_id
        self.request = request = TuningJobRequest.stored(job.request)
        self.tuner = request.tuner
        self.network_calls = 0

        def before_call(num_samples: int) -> None:
            lease.check()
            self.network_calls += num_samples
            lease.meter.count(num_samples)
            self.progress.count()

        def model_in(dtype: torch.dtype) -> DiffusionModel:
            return runtime.load_model(job.model_id, dtype).clipped_as(request.clipping).watched(before_call)

        self._model_in = model_in
        self.experiment = Experiment(
            model_in(torch.float32),
            guidance_of(request),
            get_sampler(request.sampler),
            float(request.eta),
            request.seed,
            request.evaluation.batch_size,
            runtime.device,
            guidance_scales=guidance_scales_of(request),
        )
        resumed = any(step.iterations for step in job.steps)
        self._curves = known_curves(runtime, request, list(self.experiment.at_scales()))
        checks = checks_teacher and not resumed
        phases = phases_of(request, self.experiment, self._curves, resumed=resumed, checks_teacher=checks)
        self.progress = TuningProgress(phases, runtime.settings.save_seconds)
        # Only network calls tell how far a search for a grid is, which has one iteration, or a solver, whose are long.
        self.progress.stores_itself = self.tuner.iterations > 1 and not self.tuner.has_long_iterations
        self.timesteps = timesteps_of(request, self.experiment.model.noise_schedule)
        lease.meter.start()

    @property
    def tuned_steps(self) -> list[int]:
        """The steps that the tuner changes."""
        return self.tuner.tuned_steps(self.request.num_steps)

    @property
    def total_iters(self) -> int:
        """The iterations after which a step is done at the latest. A search for a grid has one."""
        return self.tuner.iterations

    def tune(self, state: TuningState, steps: list[int] | None = None) -> Iterator[TuningState]:
        """Tune from wherever `state` is, which is updated in place and given after each iteration.

        Args:
            steps: of a tuner whose steps do not depend on each other, only these.
        """
        if bool(state.done[self.tuned_steps if steps is None else steps].all()):
            return  # No population is made for steps that are done.
        yield from self.tuner.run(self._problem(), state, steps)

    def check_teacher(self) -> None:
        """Refuse the job if its teacher is not fit to judge schedules by. Raises: JobRefusedError."""
        try:
            self.experiment.check_teacher(self.request.evaluation.teacher_num_steps)
        except TeacherError as error:
            steps = self.request.evaluation.teacher_num_steps
            raise JobRefusedError(f"the teacher of {steps} steps fails its check, as {error}") from None

    def evaluate(self, state: TuningState) -> tuple[Evaluation, dict[str, Any]]:
        """The evaluation of the tuned sampler in the precision that it serves in, and what the provenance says of that.

        It serves in the precision that the worker's setting has tried, if the verdict accepts it so, too, and otherwise
        in float32.
        """
        held_out: dict[float, HeldOut] = {}
        exact, dtype = self._evaluate(state, held_out), self.runtime.tried_dtype
        provenance: dict[str, Any] = {"serves_in": dtype_name(torch.float32)}
        if dtype == torch.float32 or not exact.better:
            return exact, provenance
        try:
            served = self._model_in(dtype)
            if served.dtype != dtype:  # A mixture has no weights that could be rounded.
                return exact, provenance
            num_samples = self.request.evaluation.num_samples
            self.progress.evaluate_more(self.experiment.precision_calls(state.timesteps, num_samples))
            tried = self._evaluate(state, held_out, served)
        except RuntimeError as error:  # The device lacks memory, or an operation in that precision.
            logger.warning("%s is not tried in %s: %s", self.job_id, dtype_name(dtype), error)
            return exact, provenance | {"tried_in": dtype_name(dtype), "tried": f"failed: {error}"[:1000]}
        provenance |= {"tried_in": dtype_name(dtype), "tried": f"{tried.verdict}: {tried.reason}"}
        return (tried, provenance | {"serves_in": dtype_name(dtype)}) if tried.better else (exact, provenance)

    def _evaluate(
        self, state: TuningState, held_out: dict[float, HeldOut], served: DiffusionModel | None = None
    ) -> Evaluation:
        """The tuned sampler against the untuned one, on noise that tuning did not use: see `Experiment.evaluate`."""
        how, num_steps = self.request.evaluation, self.request.num_steps

        def on_curve(scale: float, curve: UntunedCurve) -> None:
            self._curves[scale] = curve
            self.progress.evaluate_more(self.experiment.rest_of_rival_calls(num_steps, how.num_samples, curve))
            keep_curve(self.runtime, self.request, scale, curve)

        def before_more(scale: float, start: int, end: int) -> None:
            curve = self._curves.get(scale)
            calls = self.experiment.evaluation_calls(num_steps, how.teacher_num_steps, start, end, curve)
            self.progress.evaluate_more(calls)

        return self.experiment.evaluate(
            state.timesteps,
            state.t_ratios,
            how.num_samples,
            how.teacher_num_steps,
            solver_table=state.solver_table,
            max_num_samples=how.most_samples,
            measures_worth=True,
            curves=self._curves,
            on_curve=on_curve,
            before_more=before_more,
            served=served,
            held_out=held_out,
        )

    def _problem(self) -> TuningProblem:
        """The problem that the job's tasks on this worker share, on a network that counts this attempt's calls."""
        problem = self.runtime.problem(self.job_id, self._new_problem)
        model_fn = self.experiment.guidance.model_fn(self.experiment.model)
        step_fn = self.experiment.sampler.step_fn(model_fn, problem.noise_schedule)
        return dataclasses.replace(problem, model_fn=model_fn, step_fn=step_fn)

    def _new_problem(self) -> TuningProblem:
        tuner = self.tuner
        about_data: dict[str, Any] = {}
        if isinstance(tuner, DataTuner):
            about_data = {"data": tuner.data, "teacher_num_steps": tuner.teacher_num_steps}
        return self.experiment.problem(
            tuner.population,
            self.timesteps,
            getattr(tuner, "population_size", 1),
            getattr(tuner, "batch_size", 1),
            **about_data,
        )
