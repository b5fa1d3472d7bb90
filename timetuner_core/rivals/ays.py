"""Align Your Steps (Sabour, Fidler & Kreis 2024): the grid of least bound on the KL divergence."""

import math

import torch
from torch import Tensor

from timetuner_core.rivals.candidates import candidate_timesteps, check_at_least_1, predict, shortest_path_grid
from timetuner_core.tuning.problem import TuningProblem


def ays_timesteps(problem: TuningProblem, num_candidates: int | None = None, num_samples: int = 64) -> Tensor:
    """Align Your Steps (Sabour, Fidler & Kreis 2024): the grid of least `kl_bound_costs`, exactly, among candidates.

    The population is data. Calls the network at most `num_candidates` times per batch, whatever the number of steps.

    Args:
        num_candidates: 40, or 4 per step if that is more, when None.
        num_samples: rounded up to whole batches.

    Raises:
        ValueError: not more candidates than steps; `num_samples` or the batch size below 1; costs that are not finite.
    """
    check_at_least_1(num_samples=num_samples, batch_size=problem.batch_size)
    candidates = candidate_timesteps(
        problem, max(40, 4 * problem.num_steps) if num_candidates is None else num_candidates
    )
    if len(candidates) == 1:  # There is a single step, to time 0.
        return problem.timesteps.clone()
    return shortest_path_grid(problem, candidates, kl_bound_costs(problem, candidates, num_samples))


@torch.no_grad()
def kl_bound_costs(problem: TuningProblem, candidates: Tensor, num_samples: int) -> Tensor:
    """The share of each step from candidate i to j in AYS's bound on the KL divergence, `(M, M)` for `i < j`, else 0.

    In EDM's terms, `sigma = sigma_t / alpha_t` and x_t divided by alpha_t, that is the integral of
    `E || D(x_sigma, sigma) - D(x_i, sigma_i) ||^2 / sigma^3` from sigma_j to sigma_i, where `D` is the network's x0 and
    both come from one draw of the forward process. Estimated on `num_samples` such draws, each passing all candidates;
    between candidates the expectation is linear in `sigma ** -2`.
    """
    generator = torch.Generator().manual_seed(problem.seed)
    batches = math.ceil(num_samples / problem.batch_size)
    squares = sum(_denoiser_distances(problem, candidates, generator) for _ in range(batches))
    expectation = torch.as_tensor(squares) / (batches * problem.batch_size)
    snr = torch.exp(2 * problem.noise_schedule.marginal_lambda(candidates))
    # d(sigma^-2) = -2 sigma^-3 d(sigma), so that the trapezoid rule needs no weight.
    pieces = (expectation[:, :-1] + expectation[:, 1:]) / 2 * snr.diff() / 2
    return torch.cat([torch.zeros_like(pieces[:, :1]), pieces.triu().cumsum(dim=1)], dim=1)


def _denoiser_distances(problem: TuningProblem, candidates: Tensor, generator: torch.Generator) -> Tensor:
    """`|| D(x_i, sigma_i) - D(x_j, sigma_j) ||^2` summed over a batch of draws, `(M, M)`, float64 on the CPU."""
    rows = torch.randint(len(problem.population), (problem.batch_size,), generator=generator)
    rows = rows.to(problem.population.device)
    variances = torch.exp(-2 * problem.noise_schedule.marginal_lambda(candidates)).flip(0)
    added = torch.cat([variances[:1], variances.diff()]).sqrt()
    alpha = problem.noise_schedule.marginal_alpha(candidates).flip(0)
    x, denoised = problem.population[rows], []
    # The times rise, so that each adds noise to the one before.
    for t, std, alpha_t in zip(candidates.flip(0), added.to(x), alpha.to(x), strict=True):
        x = x + std * torch.randn(x.shape, generator=generator).to(x)
        denoised.append(predict(problem, alpha_t * x, t, rows).x0.flatten(1))
    D = torch.stack(denoised[::-1], dim=1)  # (B, M, dimension)
    exact = "donot_use_mm_for_euclid_dist"  # The other way cancels for near candidates.
    return torch.cdist(D, D, compute_mode=exact).double().square().sum(dim=0).cpu()
