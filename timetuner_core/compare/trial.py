"""One setting, one entrant after another: tuned, sampled from the held-out noise, measured."""

import math
import time
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from timetuner_core.catalog import GridName
from timetuner_core.compare.plan import (
    BASELINE,
    ENTRANTS,
    PAS,
    ComparedSetting,
    Entrant,
    Group,
    Plan,
    load_model,
    parse_guidance,
)
from timetuner_core.evaluation.distances import (
    MAX_WASSERSTEIN_DIMENSION,
    Estimate,
    Measure,
    data_measures,
    measure,
    teacher_l2,
)
from timetuner_core.evaluation.verdict import Evaluation, compare
from timetuner_core.grids import make_timesteps, teacher_timesteps
from timetuner_core.rivals.pas import PasCorrection, pas_correction
from timetuner_core.samplers import get_sampler, sample_steps
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.tuners import EndToEndTuner, SolverTuner
from timetuner_core.tuning.problem import TuningState
from timetuner_core.tuning_setup import EVALUATION_SEEDS, TUNING_SEEDS, Experiment

SAME = "the same schedule as untuned"
METRICS = ("teacher_l2", "frechet", "frechet_features", "sliced_wasserstein", "wasserstein", "kl")
NUM_DRAWN_PATHS = 6
NUM_DRAWN_DATA_POINTS = 400

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Outcome:
    """How an entrant did in a setting.

    Attributes:
        evaluation: against the baseline; None if the entrant does not apply.
        reason: why it was accepted, rejected, left undecided, or does not apply; or `SAME`.
        nfe: the network's evaluations for one sample, guidance aside.
        tuning_calls: samples put through the network while tuning; tuning_seconds: of one core's time. What several
            entrants share counts for each.
        timesteps: `(num_steps + 1,)`. t_ratios: `(num_steps,)`. solver_table: a learned solver's. correction: that of
            PAS, if it is the entrant.
    """

    setting: ComparedSetting
    entrant: str
    evaluation: Evaluation | None = None
    reason: str = ""
    nfe: int | None = None
    tuning_calls: int = 0
    tuning_seconds: float = 0.0
    timesteps: tuple[float, ...] = ()
    t_ratios: tuple[float, ...] = ()
    solver_table: SolverTable | None = None
    correction: PasCorrection | None = None

    @property
    def verdict(self) -> Literal["baseline", "accepted", "undecided", "rejected", "not applicable"]:
        if self.evaluation is None:
            return "not applicable"
        if self.reason == SAME:
            return "baseline"
        return self.evaluation.verdict

    @property
    def is_turned_down(self) -> bool:
        """Whether it was evaluated and is not accepted."""
        return self.verdict in {"undecided", "rejected"}

    @property
    def is_duplicate(self) -> bool:
        """Whether it is the baseline under another name."""
        return self.verdict == "baseline" and self.entrant != BASELINE

    def figure(self, metric: str) -> float | None:
        """One of `METRICS`, of this entrant's samples; None if it was not measured."""
        if self.evaluation is None or metric not in self.evaluation.metrics:
            return None
        return self.evaluation.metrics[metric].after


@dataclass(frozen=True)
class Trajectories:
    """Some samples on their way, in a plane.

    Attributes:
        paths: by label, `(NUM_DRAWN_PATHS, num_steps + 1, 2)`: the teacher's, the baseline's and the best entrant's.
        data: `(P, 2)`, or None. share: of the variance of the teacher's x_t that the plane shows; 1 for 2-d x.
    """

    num_steps: int
    paths: dict[str, np.ndarray]
    data: np.ndarray | None
    share: float


@dataclass(frozen=True)
class Cost:
    """Samples put through the network, and seconds of one core."""

    calls: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.calls + other.calls, self.seconds + other.seconds)


@dataclass(frozen=True)
class Teaching:
    """A teacher's samples for all settings of a group; arrays, as they go from process to process.

    Attributes:
        held_out: from the noise that judges, `(num_samples, *image_shape)`.
        tuning: from the noise that end-to-end tuning sees, `(noise_population, *sample_shape)`, or None if no
            entrant needs it; cost: what it took.
    """

    held_out: np.ndarray
    tuning: np.ndarray | None
    cost: Cost


@dataclass(frozen=True)
class SettingResult:
    """The outcomes in one setting, in the plan's order, and trajectories if the plan wants them of it."""

    outcomes: list[Outcome]
    trajectories: Trajectories | None


def teach(plan: Plan, group: Group) -> Teaching:
    return Bench(plan, group).teach(any(ENTRANTS[name].follows_teacher for name in plan.entrants))


def run_setting(plan: Plan, setting: ComparedSetting, teaching: Teaching) -> SettingResult:
    trial = Trial(Bench(plan, setting.group), setting, teaching)
    outcomes = [trial.outcome(name) for name in plan.entrants]
    is_drawn = setting.num_steps == plan.drawn_num_steps
    return SettingResult(outcomes, trial.trajectories(outcomes) if is_drawn else None)


class Bench:
    """A group in one process: what is sampled and how, with a network that counts."""

    def __init__(self, plan: Plan, group: Group) -> None:
        self.effort = plan.effort
        self.calls = 0
        model = load_model(group.model)

        def count(num_samples: int) -> None:
            self.calls += num_samples

        self.experiment = Experiment(
            model.watched(count),
            parse_guidance(group.guidance),
            get_sampler(group.sampler),
            seed=plan.seed,
            rows_at_once=plan.effort.rows_at_once,
        )
        self.noise_schedule = model.noise_schedule
        self.held_out = self._noise(plan.num_samples, EVALUATION_SEEDS)
        self.tuning_noise = self._noise(plan.effort.noise_population, TUNING_SEEDS)

    def counted(self, work: Callable[[], _Result]) -> tuple[_Result, Cost]:
        """The result of some work, and its cost."""
        calls, seconds = self.calls, time.process_time()
        result = work()
        return result, Cost(self.calls - calls, time.process_time() - seconds)

    def teach(self, tuning: bool) -> Teaching:
        """tuning: whether end-to-end tuning will want its own."""
        experiment, effort = self.experiment, self.effort
        held_out = experiment.teach(*self.held_out, effort.teacher_num_steps).numpy()
        if not tuning or experiment.adds_noise:
            return Teaching(held_out, None, Cost())
        num_steps = effort.tuning_teacher_num_steps
        taught, cost = self.counted(lambda: experiment.teach(*self.tuning_noise, num_steps, decode=False))
        return Teaching(held_out, taught.numpy(), cost)

    def _noise(self, count: int, base: int) -> tuple[list[int], Tensor | None]:
        return self.experiment.seeds(count, base), self.experiment.conditions(count, base)


class Trial:
    """A bench set to one number of steps: every entrant's tuning and judgement."""

    def __init__(self, bench: Bench, setting: ComparedSetting, teaching: Teaching) -> None:
        self.bench, self.setting = bench, setting
        self.teacher_samples = torch.from_numpy(teaching.held_out)
        self.target = None if teaching.tuning is None else torch.from_numpy(teaching.tuning)
        self.target_cost = teaching.cost
        self.experiment, self.effort = bench.experiment, bench.effort
        is_conditional = self.experiment.guidance.type != "uncond"
        mixture = None if is_conditional else self.experiment.model.mixture
        has_data = self.experiment.model.reference is not None and not self.experiment.guidance.guides
        measured = _measures(setting.group.model, is_conditional) if has_data else None
        self.measures = measured or data_measures(self.teacher_samples, self.experiment.model.features, mixture)
        # KL takes longer than all else in more dimensions.
        small = mixture is not None and math.prod(mixture.sample_shape) <= MAX_WASSERSTEIN_DIMENSION
        self.has_kl = small and not self.experiment.adds_noise
        self._figures: dict[Hashable, dict[str, Estimate]] = {}

    def outcome(self, name: str) -> Outcome:
        """Tune, sample from the held-out noise and compare with the baseline."""
        try:
            state, correction, cost = self._tune(ENTRANTS[name])
        except ValueError as error:
            return Outcome(self.setting, name, reason=str(error))
        before, after = (
            self._figures_of(self._start("default"), None),
            self._figures_of(state.timesteps, state.t_ratios, state.solver_table, correction),
        )
        result = compare(before, after, adds_noise=self.experiment.adds_noise)
        reason = SAME if before is after else result.reason
        return Outcome(
            self.setting,
            name,
            result,
            reason,
            self.experiment.sampler.network_calls(state.timesteps),
            cost.calls,
            cost.seconds,
            tuple(state.timesteps.tolist()),
            tuple(state.t_ratios.tolist()),
            state.solver_table,
            correction,
        )

    def trajectories(self, outcomes: list[Outcome]) -> Trajectories | None:
        """Paths of the teacher, the baseline and the entrant nearest to the teacher; None if the sampler adds noise."""
        if self.experiment.adds_noise:
            return None
        tuned = [o for o in outcomes if o.verdict == "accepted" or o.is_turned_down]
        closest = sorted(tuned, key=lambda o: o.figure("teacher_l2") or math.inf)[:1]
        teacher = teacher_timesteps(self.bench.noise_schedule, self.effort.teacher_num_steps)
        paths = {"teacher": self._paths(self.experiment, teacher, torch.ones(len(teacher) - 1))}
        for outcome in [o for o in outcomes if o.entrant == BASELINE] + closest:
            timesteps, t_ratios = torch.tensor(outcome.timesteps).double(), torch.tensor(outcome.t_ratios)
            experiment = self._solved(timesteps, outcome.solver_table, outcome.correction)
            paths[outcome.entrant] = self._paths(experiment, timesteps, t_ratios)
        draw_data = self.experiment.model.draw_data
        generator = torch.Generator().manual_seed(self.experiment.seed)
        data = None if draw_data is None else draw_data(NUM_DRAWN_DATA_POINTS, generator)[0]
        return _in_plane(self.setting.num_steps, paths, data)

    def _tune(self, entrant: Entrant) -> tuple[TuningState, PasCorrection | None, Cost]:
        """Raises ValueError: the entrant does not apply."""
        timesteps, shared = self._best_start if entrant.grid == "best" else (self._start(entrant.grid), Cost())
        if entrant.follows_teacher:
            shared += self.target_cost
        if entrant.objective == PAS:
            correction, cost = self.bench.counted(lambda: self._pas(timesteps))
            return TuningState.start(timesteps), correction, shared + cost
        state, cost = self.bench.counted(lambda: self._tuned(entrant, timesteps))
        return state, None, shared + cost

    def _pas(self, timesteps: Tensor) -> PasCorrection:
        effort = self.effort
        problem = self.experiment.problem("noise", timesteps, effort.noise_population, effort.rows_at_once)
        return pas_correction(problem, effort.tuning_teacher_num_steps, effort.noise_population)

    def _tuned(self, entrant: Entrant, timesteps: Tensor) -> TuningState:
        effort = self.effort
        tuner = entrant.tuner(effort, self.experiment.sampler, self.setting.num_steps)
        population_size = effort.data_population if tuner.population == "data" else effort.noise_population
        batch_size = getattr(tuner, "batch_size", effort.batch_size)
        problem = self.experiment.problem(tuner.population, timesteps, population_size, batch_size)
        state = TuningState.start(timesteps)
        if isinstance(tuner, SolverTuner):
            tuned = tuner.run(problem, state, target=self.target)
        elif isinstance(tuner, EndToEndTuner):
            # There are few rows, so remembering every step takes little memory.
            tuned = tuner.run(problem, state, target=self.target, recompute=False)
        else:
            tuned = tuner.run(problem, state)
        for _ in tuned:
            pass
        return state

    def _start(self, grid: GridName) -> Tensor:
        return make_timesteps(self.bench.noise_schedule, self.setting.num_steps, grid)

    @cached_property
    def _best_start(self) -> tuple[Tensor, Cost]:
        """The named grid whose samples are closest to the teacher's, on noise that tuning sees."""
        target = self.target
        if target is None:
            return self._start("default"), Cost()  # The tuner refuses this case by itself.
        seeds, condition = self.bench.tuning_noise
        rows = slice(self.effort.search_samples)
        condition = None if condition is None else condition[rows]

        def error(timesteps: Tensor) -> float:
            samples = self.experiment.sample(seeds[rows], condition, timesteps, decode=False)
            return float(teacher_l2(samples, target[rows]).mean())

        grids = {tuple(grid.tolist()): grid for grid in map(self._start, get_args(GridName))}
        return self.bench.counted(lambda: min(grids.values(), key=error))

    def _solved(
        self, timesteps: Tensor, solver_table: SolverTable | None, correction: PasCorrection | None
    ) -> Experiment:
        """The experiment with what an entrant found in the sampler's place."""
        if correction is None:
            return self.experiment.with_solver(solver_table, timesteps)
        return replace(self.experiment, sampler=correction.sampler(self.experiment.sampler, len(timesteps) - 1))

    def _figures_of(
        self,
        timesteps: Tensor,
        t_ratios: Tensor | None,
        solver_table: SolverTable | None = None,
        correction: PasCorrection | None = None,
    ) -> dict[str, Estimate]:
        """The distances of one schedule, measured once: two names may stand for one grid."""
        ratios = torch.ones(len(timesteps) - 1) if t_ratios is None else t_ratios
        solver = str(solver_table and solver_table.to_dict()), str(correction and correction.coordinates)
        key = tuple(timesteps.tolist()), tuple(ratios.tolist()), solver
        if key not in self._figures:
            experiment = self._solved(timesteps, solver_table, correction)
            samples = experiment.sample(*self.bench.held_out, timesteps, ratios)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # PyTorch itself uses it.
                kl_terms = experiment.kl_terms(timesteps, ratios) if self.has_kl else None
            self._figures[key] = measure(samples, self.teacher_samples, self.measures, kl_terms)
        return self._figures[key]

    @torch.no_grad()
    def _paths(self, experiment: Experiment, timesteps: Tensor, t_ratios: Tensor) -> Tensor:
        """x_t from some noises, `(NUM_DRAWN_PATHS, num_steps + 1, D)`."""
        problem = experiment.problem("noise", timesteps, NUM_DRAWN_PATHS, NUM_DRAWN_PATHS)
        kwargs = dict(problem.step_kwargs) | ({} if problem.condition is None else {"condition": problem.condition})
        steps = sample_steps(problem.step_fn, problem.population, timesteps, t_ratios, **kwargs)
        return torch.stack([problem.population, *(x_s for x_s, _ in steps)], dim=1).flatten(2).double()


def _in_plane(num_steps: int, paths: dict[str, Tensor], data: Tensor | None) -> Trajectories:
    """Projected onto the first two principal components of the teacher's x_t; x of two dimensions as it is."""
    points = paths["teacher"].flatten(0, 1)
    centre, axes, share = torch.zeros_like(points[0]), torch.eye(points.shape[1], dtype=points.dtype)[:, :2], 1.0
    if points.shape[1] > 2:
        centre = points.mean(dim=0)
        _, singular, right = torch.linalg.svd(points - centre, full_matrices=False)
        axes, variances = right[:2].T, singular.square()
        share = float(variances[:2].sum() / variances.sum())

    def project(x: Tensor) -> np.ndarray:
        return ((x.double() - centre) @ axes).numpy()

    plane = {name: project(path) for name, path in paths.items()}
    return Trajectories(num_steps, plane, None if data is None else project(data.flatten(1)), share)


@cache
def _measures(model_name: str, is_conditional: bool) -> dict[str, Measure]:
    """Distances to a model's data."""
    model = load_model(model_name)
    assert model.reference is not None
    return data_measures(model.reference, model.features, None if is_conditional else model.mixture)
