"""Candidate times that rival grids choose from, and the cheapest path through them."""

import torch
from torch import Tensor

from timetuner_core.grids import EDM_RHO, check_timesteps, evenly
from timetuner_core.guided_model import Prediction
from timetuner_core.tuning.problem import TuningProblem


def dp_path(cost: Tensor, num_steps: int, discount: float = 1.0) -> list[int]:
    """The path of exactly `num_steps` hops from 0 to M - 1, each to a higher index, of least
    `sum_k discount**k cost[i_k, i_{k+1}]`, by dynamic programming; `num_steps + 1` indices.

    Args:
        cost: `(M, M)`; only `i < j` is read, infinite where there is no hop.

    Raises:
        ValueError: `cost` not square, or NaN; `num_steps` not in 1..M - 1; no path of finite cost.
    """
    size = len(cost)
    if cost.ndim != 2 or cost.shape != (size, size):
        raise ValueError(f"cost has shape {tuple(cost.shape)}; accepted: square")
    if not 1 <= num_steps < size:
        raise ValueError(f"num_steps is {num_steps}; accepted: 1 to {size - 1}, fewer than the candidates")
    if bool(cost.triu(1).isnan().any()):
        raise ValueError(
            "a cost is not a number: the network's answers are not finite; accepted: a network that gives numbers"
        )
    upward = torch.ones_like(cost, dtype=torch.bool).triu(1)
    hop = torch.where(upward, cost.double(), torch.inf).cpu()
    least = torch.full((size,), torch.inf, dtype=torch.float64)
    least[-1] = 0.0  # Only the end needs no hops.
    following = []
    for _ in range(num_steps):
        least, following_k = (hop + discount * least).min(dim=1)
        following.append(following_k)
    if not bool(least[0].isfinite()):
        raise ValueError(f"no path of {num_steps} hops has a finite cost")
    path = [0]
    for following_k in reversed(following):
        path.append(int(following_k[path[-1]]))
    return path


def candidate_timesteps(problem: TuningProblem, num_candidates: int) -> Tensor:
    """About `num_candidates` times to choose from, `(M,)`, falling from the problem's first time to its last positive
    one: half of them even in lambda, half in time (for EDM, whose t is sigma, in `sigma ** (1 / 7)`).

    Raises:
        ValueError: no more candidates than steps.
    """
    least = problem.num_steps + 1
    if num_candidates < least:
        raise ValueError(f"num_candidates is {num_candidates}; accepted for {least - 1} steps: {least} or more")
    schedule, ends = problem.noise_schedule, grid_ends(problem)
    count = num_candidates - num_candidates // 2
    in_lambda = schedule.inverse_lambda(evenly(schedule.marginal_lambda(ends), count - 1))
    rho = EDM_RHO if schedule.default_grid == "edm" else 1.0
    in_time = evenly(ends ** (1 / rho), num_candidates - count + 1) ** rho
    inner = torch.cat([in_lambda[1:-1], in_time[1:-1]])
    times = torch.cat([ends, inner[(inner < ends[0]) & (inner > ends[1])]]).sort(descending=True).values
    return times[torch.cat([times[:1] > 0, times.diff() < 0])]


def fixed_steps(problem: TuningProblem) -> int:
    """How many of the steps, at the end, are not to be changed: the one to time 0."""
    return int(problem.timesteps[-1] == 0)


def grid_ends(problem: TuningProblem) -> Tensor:
    """The first and the last positive time, `(2,)`."""
    return problem.timesteps[[0, -1 - fixed_steps(problem)]].double().cpu()


def with_end(problem: TuningProblem, timesteps: Tensor) -> Tensor:
    """A grid between `_ends`, with the step to time 0 if the problem has it."""
    whole = torch.cat([timesteps, timesteps.new_zeros(fixed_steps(problem))])
    return check_timesteps(problem.noise_schedule, whole)


def shortest_path_grid(problem: TuningProblem, candidates: Tensor, cost: Tensor, discount: float = 1.0) -> Tensor:
    path = dp_path(cost, problem.num_steps - fixed_steps(problem), discount)
    return with_end(problem, candidates[path])


def predict(problem: TuningProblem, x: Tensor, t: Tensor, rows: Tensor) -> Prediction:
    """The network's answer for a batch, untuned."""
    return problem.model_fn.predict(x, t, 1.0, problem.condition_of(rows), problem.step_kwargs.get("uncond_condition"))


def check_at_least_1(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; accepted: 1 or more")
