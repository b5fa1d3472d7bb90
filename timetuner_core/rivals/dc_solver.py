"""DC-Solver (Zhao et al., ECCV 2024): what the network said last is compensated before a step extrapolates it."""

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from timetuner_core.guided_model import Prediction, expand_like
from timetuner_core.rivals.trajectory import as_remembered, predict_all, step_of, table_sampler_of, teacher_trajectory
from timetuner_core.samplers import Past, Sampler, Step
from timetuner_core.samplers.multistep import UNIPC_ORDERS, unipc
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.tuning.problem import TuningProblem

NUM_EARLIER = 2  # The authors' `dc_order`: x0 is taken to be a parabola in time, through three of its values.
NUM_ITERS = 40
LR = 0.1


def dc_solver_table(problem: TuningProblem, teacher_num_steps: int = 100, num_samples: int = 16) -> SolverTable:
    """The solver that `dc_sampler` makes of the problem's sampler, with the ratios of `dc_ratios`.

    Raises:
        ValueError: as `dc_ratios`.
    """
    ratios = dc_ratios(problem, teacher_num_steps, num_samples)
    sampler = dc_sampler(table_sampler_of(problem), ratios)
    return SolverTable.of_sampler(sampler, problem.noise_schedule, problem.timesteps)


def dc_sampler(sampler: Sampler, ratios: Tensor) -> Sampler:
    """DC-Solver on top of a sampler, for a grid of as many steps as there are ratios `(num_steps,)`.

    In step i, from the third on, x0_i is replaced by x0 at the time `rho_i t_i + (1 - rho_i) t_{i-1}`, on the parabola
    through x0_i and the two that were remembered before, and it is the replaced one that is remembered. UniPC corrects
    x_t by x0_i as the network said it. Ratios of 1 leave the sampler as it is.
    """

    def update(step: Step) -> tuple[Tensor, Tensor]:
        return _compensated_step(sampler, step, ratios[len(step.history)])

    return Sampler(sampler.name, update, order=1, history_length=len(ratios))


def _compensated_step(sampler: Sampler, step: Step, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """x_s and the x0 to remember; `step` has all the steps before."""
    own = as_remembered(sampler, step)
    if len(step.history) < NUM_EARLIER:
        return sampler.update(own)

    def compensate(x0: Tensor) -> Tensor:
        return _on_parabola(step, x0, ratio)

    if sampler.name in UNIPC_ORDERS:
        return unipc(own, UNIPC_ORDERS[sampler.name], compensate)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        x0 = compensate(step.predict(x, t).x0)
        return Prediction(x0, 1 / step.sigma_t * (x - step.alpha_t * x0))

    return sampler.update(replace(own, predict=predict))


def _on_parabola(step: Step, x0: Tensor, ratio: Tensor) -> Tensor:
    """x0 at the time `ratio t + (1 - ratio) t_1`, by Lagrange's polynomial through this step's and the last two's."""
    past = step.history[-NUM_EARLIER:]
    times, values = [step.t, *(p.t for p in past)], [x0, *(p.x0 for p in past)]
    at = ratio * step.t + (1 - ratio) * past[-1].t
    result = torch.zeros_like(x0)
    for i, value in enumerate(values):
        weight = torch.ones_like(at)
        for j, other in enumerate(times):
            if i != j:
                weight = weight * (at - other) / (times[i] - other)
        result = result + expand_like(weight.to(x0.device), x0) * value
    return result


@torch.no_grad()
def dc_ratios(problem: TuningProblem, teacher_num_steps: int = 100, num_samples: int = 16) -> Tensor:
    """The compensation ratio of each step, `(num_steps,)`, float64, by the authors' search.

    One step after the other, `rho_i = argmin E || x_s(rho_i) - x_s* ||^2`, where x_s* is the teacher's (see
    `teacher_trajectory`), by Adam from 1; the path goes on with the ratio of least error that was seen. The first two
    steps keep 1, as they have too short a past.

    The population is initial noise, of which at most the first `num_samples` are used.

    Raises:
        ValueError: a sampler that is no table, an interval of guidance scales, or what `teacher_trajectory` raises.
    """
    problem.check_one_scale("dc_solver")
    sampler = table_sampler_of(problem)
    trajectory = teacher_trajectory(problem, teacher_num_steps, num_samples)
    ratios = torch.ones(problem.num_steps, dtype=torch.float64)
    timesteps = problem.timesteps.double().cpu()
    x, history = trajectory[0], tuple[Past, ...]()
    for i, (t, s) in enumerate(itertools.pairwise(timesteps)):
        step = step_of(problem, predict_all(problem, sampler, x, t), x, t, s, history)
        if i >= NUM_EARLIER:
            ratios[i] = _nearest_ratio(sampler, step, trajectory[i + 1])
        x_s, x0 = _compensated_step(sampler, step, ratios[i])
        history, x = (*history, Past(t, x, x0)), x_s
    return ratios


def _nearest_ratio(sampler: Sampler, step: Step, x_star: Tensor) -> float:
    """The ratio, of those that Adam visits, by which the step ends nearest to `x_star` `(P, ...)`."""
    ratio = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([ratio], lr=LR)
    best, least = 1.0, float("inf")
    for _ in range(NUM_ITERS + 1):
        with torch.enable_grad():
            x_s = _compensated_step(sampler, step, ratio)[0]
            loss = (x_s - x_star).double().square().mean()
            (ratio.grad,) = torch.autograd.grad(loss, [ratio])
        if float(loss) < least:
            best, least = float(ratio), float(loss)
        optimizer.step()
    return best
