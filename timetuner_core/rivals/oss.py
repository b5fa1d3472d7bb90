"""OSS (Pei et al. 2025): the grid on which the sampler's own path stays nearest to a many-step one."""

import torch
from torch import Tensor

from timetuner_core.rivals.candidates import (
    candidate_timesteps,
    check_at_least_1,
    fixed_steps,
    predict,
    with_end,
)
from timetuner_core.tuning.problem import TuningProblem, whole_batches


@torch.no_grad()
def oss_timesteps(problem: TuningProblem, num_candidates: int | None = None, num_samples: int = 32) -> Tensor:
    """The grid found by OSS's dynamic programming (Pei et al. 2025, "Optimal Stepsize for Diffusion Sampling").

    After k steps, each candidate time keeps the one of all paths to it that is nearest to the trajectory, and goes on
    from where that path really is. A path is made of first-order steps (DDIM, Euler). The trajectory takes one such
    step between each two neighbouring candidates. Nearness is the Euclidean distance of x_t, averaged over samples.

    The population is initial noise, of which at most the first `num_samples` are used. Each sample calls the network
    at most once per candidate and step.

    Args:
        num_candidates: 61, or 4 per step if that is more, when None.

    Returns:
        `(num_steps + 1,)`, float64.

    Raises:
        ValueError: not more candidates than steps; `num_samples` or the batch size below 1; a path that is not finite.
    """
    check_at_least_1(num_samples=num_samples, batch_size=problem.batch_size)
    candidates = candidate_timesteps(
        problem, max(61, 4 * problem.num_steps) if num_candidates is None else num_candidates
    )
    if len(candidates) == 1:  # There is a single step, to time 0.
        return problem.timesteps.clone()
    x_T = problem.population[:num_samples]
    trajectory = [x_T]
    for i in range(len(candidates) - 1):
        trajectory.append(_steps(problem, candidates, trajectory[i], i, [i + 1])[0])
    path = _nearest_path(problem, candidates, trajectory, problem.num_steps - fixed_steps(problem))
    return with_end(problem, candidates[path])


def _nearest_path(problem: TuningProblem, candidates: Tensor, trajectory: list[Tensor], num_hops: int) -> list[int]:
    """The candidates that the path of `num_hops` steps passes, `num_hops + 1` indices."""
    end = len(candidates) - 1
    reached = {0: trajectory[0]}
    arrivals: list[dict[int, int]] = []  # Each hop has, for each candidate, the place that its kept path came from.
    for hops_left in range(num_hops, 0, -1):
        nearest: dict[int, float] = {}
        states: dict[int, Tensor] = {}
        origins: dict[int, int] = {}
        for i, x_t in reached.items():
            ends = [end] if hops_left == 1 else list(range(i + 1, end - hops_left + 2))
            for j, x_s in zip(ends, _steps(problem, candidates, x_t, i, ends), strict=True):
                distance = float((x_s - trajectory[j]).flatten(1).norm(dim=1).double().mean())
                if distance < nearest.get(j, float("inf")):
                    nearest[j], states[j], origins[j] = distance, x_s, i
        reached = states
        arrivals.append(origins)
    if end not in reached:
        raise ValueError("no path is finite: the network's answers are not; accepted: a network that gives numbers")
    path = [end]
    for origins in reversed(arrivals):
        path.append(origins[path[-1]])
    return path[::-1]


def _steps(problem: TuningProblem, candidates: Tensor, x_t: Tensor, i: int, ends: list[int]) -> list[Tensor]:
    """x_s `(B, ...)` at each of the candidates `ends`, by one first-order step from x_t at candidate i."""
    predictions = [predict(problem, x_t[rows], candidates[i], rows) for rows in whole_batches(problem, len(x_t))]
    x0, eps = (torch.cat(parts)[: len(x_t)] for parts in zip(*predictions, strict=True))
    alpha = problem.noise_schedule.marginal_alpha(candidates).tolist()
    sigma = problem.noise_schedule.marginal_std(candidates).tolist()
    return [alpha[j] * x0 + sigma[j] * eps for j in ends]
