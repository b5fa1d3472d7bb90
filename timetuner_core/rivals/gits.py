"""GITS (Chen et al., ICML 2024): the grid nearest a many-step trajectory, by dynamic programming."""

import torch
from torch import Tensor

from timetuner_core.guided_model import expand_like
from timetuner_core.rivals.candidates import candidate_timesteps, check_at_least_1, predict, shortest_path_grid
from timetuner_core.tuning.problem import TuningProblem, whole_batches


def gits_timesteps(
    problem: TuningProblem, num_candidates: int | None = None, discount: float = 1.15, max_samples: int = 256
) -> Tensor:
    """GITS (Chen et al., ICML 2024): the grid of least `trajectory_costs`, discounted, among candidates.

    The population is initial noise, of which at most the first `max_samples` are used. Calls the network
    fewer than `num_candidates` times per batch, whatever the number of steps.

    Args:
        num_candidates: 61, as in the authors' code, or 4 per step if that is more, when None.
        discount: the authors' coefficient, see `dp_path`; above 1, late steps are kept more exact.

    Raises:
        ValueError: not more candidates than steps; `discount` not above 0; `max_samples` or the batch size below 1;
            costs that are not finite.
    """
    check_at_least_1(max_samples=max_samples, batch_size=problem.batch_size)
    if not discount > 0:
        raise ValueError(f"discount is {discount}; accepted: above 0")
    candidates = candidate_timesteps(
        problem, max(61, 4 * problem.num_steps) if num_candidates is None else num_candidates
    )
    if len(candidates) == 1:  # There is a single step, to time 0.
        return problem.timesteps.clone()
    return shortest_path_grid(problem, candidates, trajectory_costs(problem, candidates, max_samples), discount)


@torch.no_grad()
def trajectory_costs(problem: TuningProblem, candidates: Tensor, max_samples: int) -> Tensor:
    """How far one first-order step from candidate i to j ends from the trajectory, `(M, M)` for `i < j`, else 0.

    The trajectory is the same sampler's (DDIM, Euler) over all candidates; the distance is Euclidean, averaged over
    samples, in `x_t / alpha_t`, or, where alpha falls to 0, in `x_t / (alpha_t + sigma_t)`.
    """
    size = min(len(problem.population), max_samples)
    total = torch.zeros(len(candidates), len(candidates), dtype=torch.float64)
    for rows in whole_batches(problem, size):
        count = min(problem.batch_size, size - int(rows[0]))
        total += _step_errors(problem, candidates, rows)[:, :, :count].sum(dim=2).double().cpu()
    return total / size


def _step_errors(problem: TuningProblem, candidates: Tensor, rows: Tensor) -> Tensor:
    """`trajectory_costs` of each sample of a batch, `(M, M, B)`."""
    schedule, x_T = problem.noise_schedule, problem.population[rows]
    alpha, sigma = schedule.marginal_alpha(candidates), schedule.marginal_std(candidates)
    norm = alpha + sigma if schedule.starts_without_signal else alpha
    signal, noise, norm, inverse_norm = (c.to(x_T) for c in (alpha / norm, sigma / norm, norm, 1 / norm))
    z = [inverse_norm[0] * x_T]
    predictions = []
    for i, t in enumerate(candidates[:-1]):
        x0, eps = predict(problem, norm[i] * z[i], t, rows)
        predictions.append((x0.flatten(1), eps.flatten(1)))
        z.append(signal[i + 1] * x0 + noise[i + 1] * eps)
    trajectory = torch.stack(z).flatten(2)  # (M, B, dimension)
    errors = trajectory.new_zeros(len(candidates), len(candidates), len(rows))
    for i, (x0, eps) in enumerate(predictions):
        later = slice(i + 2, None)  # The step to the next candidate is the trajectory itself.
        stepped = expand_like(signal[later], trajectory) * x0 + expand_like(noise[later], trajectory) * eps
        errors[i, later] = torch.linalg.vector_norm(stepped - trajectory[later], dim=2)
    return errors
