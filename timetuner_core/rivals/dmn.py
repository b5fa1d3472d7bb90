"""DMN (Xue et al., CVPR 2024): the grid of least bound on the result's error; it asks the network nothing."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from timetuner_core.catalog import NAMED_GRIDS
from timetuner_core.grids import grid_between
from timetuner_core.guided_model import GuidedModel
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.rivals.candidates import check_at_least_1, fixed_steps, grid_ends, with_end
from timetuner_core.samplers import SAMPLERS, SamplerStep, sample_steps
from timetuner_core.tuning.problem import TuningProblem

# DMN's search keeps every step above this share of the average step in lambda: samplers divide by steps.
MIN_STEP_SHARE = 0.01

# Some samplers' own weights mislead DMN, so it takes those of another. For UniPC DMN's code does so too. The errors of
# samplers that extrapolate eps grow without bound where a network ignores x, which a real one does not.
WEIGHTS_OF = {"unipc_2": "dpmpp_3m", "unipc_3": "dpmpp_3m", "ipndm": "dpmpp_3m", "deis": "dpmpp_3m"}

# Errors of the first three steps may not cancel errors of later steps in DMN's bound.
SEPARATE_STEPS = 3


def dmn_timesteps(problem: TuningProblem, power: float = 2.0, max_iters: int = 100) -> Tensor:
    """DMN (Xue et al., CVPR 2024): the grid of least `dmn_bound`, by L-BFGS on the steps in lambda.

    Neither the network nor the population is used. Starts from the best two of the named grids between the problem's
    ends, by that bound, and never ends worse than any of the four.

    Args:
        max_iters: of L-BFGS, per start.

    Raises:
        ValueError: a step function that is no shipped or installed `Sampler`'s; `power` below 0.
    """
    check_at_least_1(max_iters=max_iters)
    schedule, ends = problem.noise_schedule, grid_ends(problem)
    if problem.num_steps == 1:
        dmn_bound(problem, problem.timesteps, power)  # It refuses the same samplers as with more steps.
        return problem.timesteps.clone()
    lambda_first, lambda_last = schedule.marginal_lambda(ends).unbind()

    def grid_of(logits: Tensor) -> Tensor:
        least = MIN_STEP_SHARE / len(logits)
        steps = (least + (1 - MIN_STEP_SHARE) * torch.softmax(logits, dim=0)) * (lambda_last - lambda_first)
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

    num_steps = problem.num_steps - fixed_steps(problem)
    grids = sorted((grid_between(schedule, ends, num_steps, name) for name in NAMED_GRIDS), key=bound_of)
    for start in grids[:2]:
        shares = schedule.marginal_lambda(start).diff() / (lambda_last - lambda_first)
        logits = (shares - MIN_STEP_SHARE / len(shares)).clamp(min=1e-6).log()
        result = minimize(
            bound_and_gradient,
            logits.numpy(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": max_iters, "ftol": 1e-4},
        )
        grids.append(grid_of(torch.from_numpy(result.x)))
    falling = [grid for grid in grids if bool((grid.diff() < 0).all())]
    return with_end(problem, min(falling, key=bound_of))


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
    """The error of the network's x0 at t that `dmn_bound` assumes."""
    if noise_schedule.starts_without_signal:
        alpha, sigma = noise_schedule.marginal_alpha(t), noise_schedule.marginal_std(t)
        error: Tensor = sigma**power / (alpha + sigma)
        return error
    lambda_t = noise_schedule.marginal_lambda(t)
    log_sigma = functional.logsigmoid(-2 * lambda_t) / 2
    return torch.exp((power - 1) * log_sigma - lambda_t)


def x0_weights(step_fn: SamplerStep, timesteps: Tensor, eta: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of x_T and of each predicted x0 in a sampler's result on a grid to a positive time.

    Found by running the sampler itself on a network that answers with unit vectors, so exact for any sampler that is
    linear in x0, as all shipped ones are. Differentiable in `timesteps`.

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
    # x / sigma grows by the x0's alone: all that was there before a step shrinks like sigma until the end.
    sigma = schedule.marginal_std(timesteps)
    states = torch.stack([x_T, *(x_s for x_s, _ in steps)])[:, 0] * (sigma[-1] / sigma)[:, None]
    return states.diff(dim=0)[:, 1:], schedule.time_of_model_input(torch.stack(inputs)), states[-1, 0]
