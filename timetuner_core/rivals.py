"""Time grids that published rivals of `t_ratios` would choose: AYS, GITS and DMN.

Each takes a `TuningProblem` and gives `timesteps` `(num_steps + 1,)`, float64, falling, with the problem's own ends
and number of steps; the times between are all that changes. A grid that ends at 0, where lambda is infinite, keeps its
last positive time too. What of each is its paper's and what is ours: docs/rivals.md.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from timetuner_core.grids import EDM_RHO, NAMED_GRIDS, check_timesteps, evenly, grid_between
from timetuner_core.model_wrapper import GuidedModel, Prediction, expand_like
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.samplers import SAMPLERS, SamplerStep, sample_steps, scaled
from timetuner_core.tuning import TuningProblem, whole_batches

# Of the average step in lambda: what DMN's search keeps every step above, lest samplers that divide by steps fail.
LEAST_STEP = 0.01

# Whose weights DMN takes for samplers whose own mislead it. UniPC: so does DMN's code. Those that extrapolate eps: a
# network that answers x0 whatever x is lets their errors grow without bound, a real one does not.
WEIGHTS_OF = {"unipc_2": "dpmpp_3m", "unipc_3": "dpmpp_3m", "ipndm": "dpmpp_3m", "deis": "dpmpp_3m"}

# How many of the first steps have no error of theirs set off against later ones', in DMN's bound.
SEPARATE_STEPS = 3


def ays_timesteps(problem: TuningProblem, num_candidates: int | None = None, num_samples: int = 64) -> Tensor:
    """Align Your Steps (Sabour, Fidler & Kreis 2024): the grid of least `kl_bound_costs`, exactly, among candidates.

    The population is data. Calls the network at most `num_candidates` times per batch, whatever the number of steps.

    Args:
        num_candidates: 40, or 4 per step if that is more, when None.
        num_samples: rounded up to whole batches.

    Raises:
        ValueError: not more candidates than steps; `num_samples` or the batch size below 1; costs that are not finite.
    """
    _check_at_least_1(num_samples=num_samples, batch_size=problem.batch_size)
    candidates = candidate_timesteps(
        problem, max(40, 4 * problem.num_steps) if num_candidates is None else num_candidates
    )
    if len(candidates) == 1:  # a single step, to time 0
        return problem.timesteps.clone()
    return _shortest(problem, candidates, kl_bound_costs(problem, candidates, num_samples))


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
    _check_at_least_1(max_samples=max_samples, batch_size=problem.batch_size)
    if not discount > 0:
        raise ValueError(f"discount is {discount}; accepted: above 0")
    candidates = candidate_timesteps(
        problem, max(61, 4 * problem.num_steps) if num_candidates is None else num_candidates
    )
    if len(candidates) == 1:  # a single step, to time 0
        return problem.timesteps.clone()
    return _shortest(problem, candidates, trajectory_costs(problem, candidates, max_samples), discount)


def dmn_timesteps(problem: TuningProblem, power: float = 2.0, max_iters: int = 100) -> Tensor:
    """DMN (Xue et al., CVPR 2024): the grid of least `dmn_bound`, by L-BFGS on the steps in lambda.

    Neither the network nor the population is used. Starts from the best two of the named grids between the problem's
    ends, by that bound, and never ends worse than any of the four.

    Args:
        max_iters: of L-BFGS, per start.

    Raises:
        ValueError: a step function that is no shipped or installed `Sampler`'s; `power` below 0.
    """
    _check_at_least_1(max_iters=max_iters)
    schedule, ends = problem.noise_schedule, _ends(problem)
    if problem.num_steps == 1:
        dmn_bound(problem, problem.timesteps, power)  # refuses what it refuses for more steps
        return problem.timesteps.clone()
    lambda_first, lambda_last = schedule.marginal_lambda(ends).unbind()

    def grid_of(logits: Tensor) -> Tensor:
        least = LEAST_STEP / len(logits)
        steps = (least + (1 - LEAST_STEP) * torch.softmax(logits, dim=0)) * (lambda_last - lambda_first)
        inner = schedule.inverse_lambda(lambda_first + steps.cumsum(0)[:-1])
        return torch.cat([ends[:1], inner, ends[1:]])

    def bound_and_gradient(values: np.ndarray) -> tuple[float, np.ndarray]:
        logits = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            bound = dmn_bound(problem, grid_of(logits), power)
            (gradient,) = torch.autograd.grad(bound, logits)
        return float(bound.detach()), gradient.numpy()

    def bound_of(grid: Tensor) -> float:
        return float(dmn_bound(problem, grid, power))

    from scipy.optimize import minimize  # type: ignore[import-untyped]  # a second of every start

    num_steps = problem.num_steps - _fixed_steps(problem)
    grids = sorted((grid_between(schedule, ends, num_steps, name) for name in NAMED_GRIDS), key=bound_of)
    for start in grids[:2]:
        shares = schedule.marginal_lambda(start).diff() / (lambda_last - lambda_first)
        logits = (shares - LEAST_STEP / len(shares)).clamp(min=1e-6).log()
        result = minimize(
            bound_and_gradient,
            logits.numpy(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": max_iters, "ftol": 1e-4},
        )
        grids.append(grid_of(torch.from_numpy(result.x)))
    falling = [grid for grid in grids if bool((grid.diff() < 0).all())]
    return _with_end(problem, min(falling, key=bound_of))


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
    least[-1] = 0.0  # with no hops left, only the end has arrived
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
    schedule, ends = problem.noise_schedule, _ends(problem)
    count = num_candidates - num_candidates // 2
    in_lambda = schedule.inverse_lambda(evenly(schedule.marginal_lambda(ends), count - 1))
    rho = EDM_RHO if schedule.default_grid == "edm" else 1.0
    in_time = evenly(ends ** (1 / rho), num_candidates - count + 1) ** rho
    inner = torch.cat([in_lambda[1:-1], in_time[1:-1]])
    times = torch.cat([ends, inner[(inner < ends[0]) & (inner > ends[1])]]).sort(descending=True).values
    return times[torch.cat([times[:1] > 0, times.diff() < 0])]


@torch.no_grad()
def kl_bound_costs(problem: TuningProblem, candidates: Tensor, num_samples: int) -> Tensor:
    """What each step from candidate i to j adds to AYS's bound on the KL divergence, `(M, M)` for `i < j`, else 0.

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
    for t, std, alpha_t in zip(candidates.flip(0), added, alpha, strict=True):  # upwards: noise is added to noise
        x = x + scaled(std, torch.randn(x.shape, generator=generator).to(x))
        denoised.append(_predict(problem, scaled(alpha_t, x), t, rows).x0.flatten(1))
    D = torch.stack(denoised[::-1], dim=1)  # (B, M, dimension)
    exact = "donot_use_mm_for_euclid_dist"  # the other way cancels for near candidates
    return torch.cdist(D, D, compute_mode=exact).double().square().sum(dim=0).cpu()


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
    schedule = problem.noise_schedule
    alpha, sigma = schedule.marginal_alpha(candidates), schedule.marginal_std(candidates)
    norm = alpha + sigma if schedule.starts_without_signal else alpha

    signal, noise = ((coefficient / norm).to(problem.population.device) for coefficient in (alpha, sigma))
    z = [scaled(1 / norm[0], problem.population[rows])]
    predictions = []
    for i, t in enumerate(candidates[:-1]):
        x0, eps = _predict(problem, scaled(norm[i], z[i]), t, rows)
        predictions.append((x0.flatten(1), eps.flatten(1)))
        z.append(scaled(signal[i + 1], x0) + scaled(noise[i + 1], eps))
    trajectory = torch.stack(z).flatten(2)  # (M, B, dimension)
    errors = trajectory.new_zeros(len(candidates), len(candidates), len(rows))
    for i, (x0, eps) in enumerate(predictions):
        later = slice(i + 2, None)  # the step to the next candidate is the trajectory itself
        stepped = expand_like(signal[later], trajectory) * x0 + expand_like(noise[later], trajectory) * eps
        errors[i, later] = torch.linalg.vector_norm(stepped - trajectory[later], dim=2)
    return errors


def dmn_bound(
    problem: TuningProblem, timesteps: Tensor, power: float = 2.0, separate_steps: int = SEPARATE_STEPS
) -> Tensor:
    """DMN's bound on the distance of the sampler's result on a grid from clean data, `()`: the sum over the network's
    calls of `|weight| * error`, with the weights of `x0_weights` and the paper's guess of x0's errors,
    `sigma**power / alpha`.

    Of the first `separate_steps` steps each has a sum of its own, of squares and under a root, as in the authors' code:
    otherwise the optimum lets their errors cancel those of later steps. alpha and sigma are those of the variance-
    preserving process of the same lambda; where alpha falls to 0, the error is `sigma**power / (alpha + sigma)`, that
    of a network that predicts `eps - x0`. The step to time 0, if the grid has it, is left out. Differentiable in
    `timesteps`.

    Raises:
        ValueError: a step function that is no shipped or installed `Sampler`'s; `power` below 0.
    """
    if not isinstance(problem.step_fn, SamplerStep):
        raise ValueError(f"step_fn is {problem.step_fn!r}; accepted: the step_fn of a Sampler, such as ddim's")
    if not power >= 0:
        raise ValueError(f"power is {power}; accepted: 0 or more")
    positive = timesteps[:-1] if len(timesteps) > 2 and bool(timesteps[-1] == 0) else timesteps
    sampler = SAMPLERS.get(WEIGHTS_OF.get(problem.step_fn.sampler.name, ""), problem.step_fn.sampler)
    step_fn = sampler.step_fn(problem.model_fn, problem.noise_schedule)
    weights, times, _ = x0_weights(step_fn, positive, problem.step_kwargs.get("eta", 0.0))
    errors = weights * _x0_error(problem.noise_schedule, times, power)
    separate: Tensor = torch.linalg.vector_norm(errors[:separate_steps], dim=1).sum()
    together: Tensor = errors[separate_steps:].sum(dim=0).abs().sum()
    return separate + together


def _x0_error(noise_schedule: NoiseSchedule, t: Tensor, power: float) -> Tensor:
    """What `dmn_bound` takes the network's x0 at t to be wrong by."""
    if noise_schedule.starts_without_signal:
        alpha, sigma = noise_schedule.marginal_alpha(t), noise_schedule.marginal_std(t)
        error: Tensor = sigma**power / (alpha + sigma)
        return error
    lambda_t = noise_schedule.marginal_lambda(t)
    log_sigma = functional.logsigmoid(-2 * lambda_t) / 2
    return torch.exp((power - 1) * log_sigma - lambda_t)


def x0_weights(step_fn: SamplerStep, timesteps: Tensor, eta: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """What a sampler's result on a grid to a positive time is made of, beside noise it adds.

    Found by running the sampler itself on a network that answers with unit vectors, so exact for any sampler that is
    linear in x0, as all of ours are. Differentiable in `timesteps`.

    Returns:
        The weight of each x0 that the network predicts, `(num_steps, C)` for C calls of the network: what each step
        adds to it, so that its sum over the steps counts. The time of each call, `(C,)`. The weight of x_T, `()`.
    """
    calls = step_fn.sampler.calls_per_step * (len(timesteps) - 1)
    x_T, *x0 = torch.eye(calls + 1, dtype=torch.float64).unsqueeze(1).unbind()
    answers = iter(x0)
    inputs: list[Tensor] = []

    def network(x: Tensor, t_input: Tensor) -> Tensor:
        inputs.append(t_input[0])
        return next(answers)

    schedule = step_fn.noise_schedule
    counting = step_fn.sampler.step_fn(GuidedModel(network, schedule, "x_start"), schedule)
    noiseless = {"noise": torch.zeros_like(x_T), "eta": eta}
    steps = sample_steps(counting, x_T, timesteps, torch.ones_like(timesteps[1:]), **noiseless)
    # x / sigma grows by x0's alone: what was there before a step goes on to the end shrunk like sigma.
    sigma = schedule.marginal_std(timesteps)
    states = torch.stack([x_T, *(x_s for x_s, _ in steps)])[:, 0] * (sigma[-1] / sigma)[:, None]
    return states.diff(dim=0)[:, 1:], schedule.time_of_model_input(torch.stack(inputs)), states[-1, 0]


def _fixed_steps(problem: TuningProblem) -> int:
    """How many of the steps, at the end, are not to be changed: the one to time 0."""
    return int(problem.timesteps[-1] == 0)


def _ends(problem: TuningProblem) -> Tensor:
    """The first and the last positive time, `(2,)`."""
    return problem.timesteps[[0, -1 - _fixed_steps(problem)]].double().cpu()


def _with_end(problem: TuningProblem, timesteps: Tensor) -> Tensor:
    """A grid between `_ends`, with the step to time 0 if the problem has it."""
    whole = torch.cat([timesteps, timesteps.new_zeros(_fixed_steps(problem))])
    return check_timesteps(problem.noise_schedule, whole)


def _shortest(problem: TuningProblem, candidates: Tensor, cost: Tensor, discount: float = 1.0) -> Tensor:
    path = dp_path(cost, problem.num_steps - _fixed_steps(problem), discount)
    return _with_end(problem, candidates[path])


def _predict(problem: TuningProblem, x: Tensor, t: Tensor, rows: Tensor) -> Prediction:
    """The network's answer for a batch, untuned."""
    condition = None if problem.condition is None else problem.condition[rows]
    return problem.model_fn.predict(x, t, 1.0, condition, problem.step_kwargs.get("uncond_condition"))


def _check_at_least_1(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; accepted: 1 or more")
