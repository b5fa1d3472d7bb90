"""Every deterministic sampler converges at its stated order, and alike for every kind of network."""

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from tests.core.conftest import Network, crossed, linear_betas, normals, small_mixture
from timetuner_core import NoiseScheduleVP, model_wrapper
from timetuner_core.guided_model import GuidedModel
from timetuner_core.models.mixtures import GaussianMixture
from timetuner_core.noise_schedule import NoiseSchedule, NoiseScheduleEDM, NoiseScheduleFlow
from timetuner_core.samplers import SAMPLERS, Past, Sampler, SamplerStep, remember, sample

SCHEDULES: dict[str, NoiseSchedule] = {
    "discrete": NoiseScheduleVP("discrete", betas=linear_betas(1000)),
    "linear": NoiseScheduleVP("linear"),
    "cosine": NoiseScheduleVP("cosine"),
    "flow": NoiseScheduleFlow(shift=3.0),
    "edm": NoiseScheduleEDM(),
}
# The mixture's components part between these, and that is where errors arise.
LAMBDA_START, LAMBDA_END = -1.5, 1.5
# Steps for which the error is proportional to its leading term, and still far above float64's rounding.
STEPS = {1: (20, 40, 80), 2: (20, 40, 80), 3: (50, 100, 200), 4: (80, 140, 240)}
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
MULTISTEP = [name for name in DETERMINISTIC if SAMPLERS[name].history_length]

MODEL_TYPES = ("x_start", "v", "score", "flow", "edm")
SIGMA_DATA = 0.5
NULL_LABEL = torch.tensor([2])


def lambda_grid(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    return schedule.inverse_lambda(torch.linspace(LAMBDA_START, LAMBDA_END, num_steps + 1, dtype=torch.float64))


def grid_of(name: str, schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Uniform in lambda; for iPNDM, whose coefficients are those of equal steps in sigma / alpha, in that."""
    if name != "ipndm":
        return lambda_grid(schedule, num_steps)
    kappa = torch.linspace(math.exp(-LAMBDA_START), math.exp(-LAMBDA_END), num_steps + 1, dtype=torch.float64)
    return schedule.inverse_lambda(-kappa.log())


@cache
def exact_trajectory(kind: str) -> Callable[[Tensor], Tensor]:
    """x_t `(16, 2)` at any time `()`, on the probability-flow ODE `d(x / alpha) / d(sigma / alpha) = eps`."""
    schedule = SCHEDULES[kind]
    mixture, x_T = small_mixture(schedule), normals(16, 2)

    def slope(lambda_: float, y: Any) -> Any:
        t = schedule.inverse_lambda(torch.tensor(lambda_, dtype=torch.float64))
        x = schedule.marginal_alpha(t) * torch.tensor(y).reshape(x_T.shape)
        eps = mixture(x, schedule.model_input_time(t).expand(len(x)))
        return -math.exp(-lambda_) * eps.flatten().numpy()

    t = lambda_grid(schedule, 1)[0]
    x_t = torch.sqrt(schedule.marginal_alpha(t) ** 2 * 0.5 + schedule.marginal_std(t) ** 2) * x_T
    start, ends = (x_t / schedule.marginal_alpha(t)).flatten().numpy(), (LAMBDA_START, LAMBDA_END)
    # A bounded step, as the interpolation between steps is of lower order than they are.
    solution = solve_ivp(slope, ends, start, method="DOP853", rtol=1e-13, atol=1e-13, dense_output=True, max_step=0.03)

    def trajectory(t: Tensor) -> Tensor:
        y = solution.sol(float(schedule.marginal_lambda(t)))
        return schedule.marginal_alpha(t) * torch.tensor(y).reshape(x_T.shape)

    return trajectory


def end_of(step_fn: SamplerStep, kind: str, grid: Tensor, warm: bool) -> Tensor:
    """The end of a sampler's path; with a warm start, its first steps, whose history is not full, are exact."""
    exact = exact_trajectory(kind)
    history: tuple[Past, ...] = ()
    skipped = step_fn.history_length if warm else 0
    for t in grid[:skipped]:
        x0 = step_fn.model_fn.predict(exact(t), t).x0
        history = (*history, Past(t, exact(t), x0))
    x = exact(grid[skipped])
    for t, s in itertools.pairwise(grid[skipped:]):
        x_s, x0 = step_fn(x, t, s, history=history)
        history, x = remember(step_fn, history, Past(t, x, x0)), x_s
    return x


def measured_order(sampler: Sampler, kind: str, warm: bool) -> float:
    """The slope of log error over log step size."""
    schedule = SCHEDULES[kind]
    step_fn = sampler.step_fn(model_wrapper(small_mixture(schedule), schedule), schedule)
    errors = []
    for num_steps in STEPS[sampler.order]:
        grid = grid_of(sampler.name, schedule, num_steps)
        error = end_of(step_fn, kind, grid, warm) - exact_trajectory(kind)(grid[-1])
        errors.append(float(error.norm(dim=1).mean()))
    return -float(np.polyfit(np.log(STEPS[sampler.order]), np.log(errors), 1)[0])


@crossed(name=DETERMINISTIC, kind=list(SCHEDULES))
def test_a_sampler_with_full_history_converges_at_its_stated_order(name: str, kind: str) -> None:
    assert measured_order(SAMPLERS[name], kind, warm=True) == pytest.approx(SAMPLERS[name].order, abs=0.15)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_sampler_that_starts_without_history_keeps_second_order(name: str) -> None:
    assert measured_order(SAMPLERS[name], "linear", warm=False) > 1.85


def answering(mixture: GaussianMixture, model_type: str) -> Network:
    """The mixture as a network of another type would give its answer."""
    schedule = mixture.noise_schedule

    def network(x: Tensor, t_input: Tensor, *condition: Tensor) -> Tensor:
        t = schedule.time_of_model_input(t_input)[:, None]
        alpha_t, sigma_t = schedule.marginal_alpha(t), schedule.marginal_std(t)
        kappa = sigma_t / alpha_t
        norm = torch.sqrt(kappa**2 + SIGMA_DATA**2)
        if model_type == "edm":
            x = alpha_t * norm * x  # such a network sees c_in x
        eps = mixture(x, t_input, *condition)
        x0 = (x - sigma_t * eps) / alpha_t
        return {
            "noise": eps,
            "x_start": x0,
            "v": alpha_t * eps - sigma_t * x0,
            "score": -eps / sigma_t,
            "flow": eps - x0,
            "edm": (x0 - (SIGMA_DATA / norm) ** 2 * x / alpha_t) / (kappa * SIGMA_DATA / norm),
        }[model_type]

    return network


def guided(mixture: GaussianMixture, model_type: str, guidance_type: str) -> GuidedModel:
    """Guidance is classifier-free, and in the middle of the grid only."""
    schedule = mixture.noise_schedule
    low, high = schedule.inverse_lambda(torch.tensor([0.8, -0.8], dtype=torch.float64)).tolist()
    arguments: dict[str, dict[str, Any]] = {
        "uncond": {},
        "classifier": {"guidance_scale": 1.5, "classifier_fn": mixture.log_class_posterior},
        "classifier-free": {"guidance_scale": 2.5, "guidance_interval": (low, high)},
    }
    kind: dict[str, Any] = {"model_type": model_type, "guidance_type": guidance_type}
    return model_wrapper(answering(mixture, model_type), schedule, **kind, **arguments[guidance_type])


@crossed(name=list(SAMPLERS), kind=list(SCHEDULES), guidance_type=["uncond", "classifier", "classifier-free"])
def test_what_a_network_predicts_does_not_change_the_samples(name: str, kind: str, guidance_type: str) -> None:
    schedule, labels = SCHEDULES[kind], torch.tensor([0, 1, 1])
    mixture, x_t, grid = small_mixture(schedule), normals(3, 2), lambda_grid(schedule, 4)

    def samples(model_type: str) -> Tensor:
        model = guided(mixture, model_type, guidance_type)
        step_fn, generator = SAMPLERS[name].step_fn(model, schedule), torch.Generator().manual_seed(0)
        conditions = {"condition": labels, "uncond_condition": NULL_LABEL}
        return sample(step_fn, x_t, grid, torch.ones(4), generator=generator, **conditions)

    expected = samples("noise")
    for model_type in MODEL_TYPES:
        torch.testing.assert_close(samples(model_type), expected, atol=1e-8, rtol=0, msg=model_type)
