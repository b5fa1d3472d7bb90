"""DDIM against diffusers, exact solutions and exact statistics; grids and seeds."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.integrate import solve_ivp
from torch import Tensor

from tests.core.conftest import Network, Recorded, crossed, linear_betas, normals, predicting, small_mixture, tuner_of
from timetuner_core import NoiseScheduleVP
from timetuner_core.models.loading import load_builtin
from timetuner_core.models.mixtures import GaussianMixture
from timetuner_core.samplers import initial_noise
from timetuner_core.sampling.generate import Guidance, generate

MODEL_TYPES = {"epsilon": "noise", "sample": "x_start", "v_prediction": "v"}
# The grid on which our DDIM takes the very steps of a DDIMScheduler, as training steps counted from 1, 0 being
# clean data: diffusers ends on `alphas_cumprod[0]` or, with `set_alpha_to_one`, on alpha = 1.
DIFFUSERS_GRIDS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "leading": ({"timestep_spacing": "leading", "set_alpha_to_one": True}, [801, 601, 401, 201, 1, 0]),
    "leading, offset 1": (
        {"timestep_spacing": "leading", "set_alpha_to_one": False, "steps_offset": 1},
        [802, 602, 402, 202, 2, 1],
    ),
    "trailing": ({"timestep_spacing": "trailing", "set_alpha_to_one": True}, [1000, 800, 600, 400, 200, 0]),
    "trailing, not to one": (
        {"timestep_spacing": "trailing", "set_alpha_to_one": False},
        [1000, 800, 600, 400, 200, 1],
    ),
}


@pytest.fixture(scope="module")
def networks() -> dict[str, Callable[[NoiseScheduleVP], Network]]:
    digits = load_builtin("digits8").network
    return {"digits8": lambda schedule: digits, "mixture": small_mixture}


@crossed(grid=list(DIFFUSERS_GRIDS), prediction_type=list(MODEL_TYPES), eta=[0.0, 1.0], name=["digits8", "mixture"])
def test_ddim_with_ratios_of_one_is_that_of_diffusers(
    networks: dict[str, Any], name: str, eta: float, prediction_type: str, grid: str
) -> None:
    shape = {"digits8": (2, 1, 8, 8), "mixture": (5, 2)}[name]
    config, training_steps = DIFFUSERS_GRIDS[grid]
    scheduler: Any = DDIMScheduler(clip_sample=False, prediction_type=prediction_type, **config)
    schedule = NoiseScheduleVP("discrete", alphas_cumprod=scheduler.alphas_cumprod)
    network = predicting(networks[name](schedule), schedule, MODEL_TYPES[prediction_type])
    x_T = normals(*shape).float()
    num_steps = len(training_steps) - 1

    scheduler.set_timesteps(num_steps)
    x, generator = x_T, torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n in scheduler.timesteps:
            noise = torch.randn(shape, generator=generator)
            prediction = network(x, torch.full((len(x),), float(n)))
            x = scheduler.step(prediction, n, x, eta=eta, variance_noise=noise).prev_sample

    ours = tuner_of(network, schedule, model_type=MODEL_TYPES[prediction_type]).ddim_sample(
        x_T,
        timesteps=torch.tensor(training_steps, dtype=torch.float64) / 1000,
        t_ratios=torch.ones(num_steps),
        eta=eta,
        generator=torch.Generator().manual_seed(1),
    )
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=0)


def test_a_ratio_moves_what_the_network_sees_and_nothing_else() -> None:
    mixture = small_mixture()
    schedule, x_t = mixture.noise_schedule, normals(4, 2)
    t, s = (torch.tensor(time, dtype=torch.float64) for time in (0.6, 0.4))
    network = Recorded(mixture)
    x_s, x0 = tuner_of(network, schedule).ddim_step_fn(x_t, t, s, t_ratio=0.9)
    eps = mixture(x_t, 0.9 * t.expand(4))
    expected_x0 = (x_t - schedule.marginal_std(t) * eps) / schedule.marginal_alpha(t)
    expected_x_s = schedule.marginal_alpha(s) * expected_x0 + schedule.marginal_std(s) * eps
    torch.testing.assert_close(network.times, [0.9 * 0.6])
    torch.testing.assert_close((x_s, x0), (expected_x_s, expected_x0), atol=1e-13, rtol=0)


def exact_solution(mixture: GaussianMixture, x_T: Tensor) -> Tensor:
    """The place to which the probability-flow ODE takes x_T by `t_min`: `d(x / alpha) / d(sigma / alpha) = eps`."""
    schedule = mixture.noise_schedule
    ends = torch.tensor([schedule.T, schedule.t_min], dtype=torch.float64)
    kappa = schedule.marginal_std(ends) / schedule.marginal_alpha(ends)

    def slope(kappa: float, y: Any) -> Any:
        t = schedule.inverse_lambda(torch.tensor(-math.log(kappa), dtype=torch.float64))
        x = schedule.marginal_alpha(t) * torch.tensor(y).reshape(x_T.shape)
        return mixture(x, schedule.model_input_time(t).expand(len(x))).flatten().numpy()

    start = (x_T / schedule.marginal_alpha(ends[0])).flatten().numpy()
    solution = solve_ivp(slope, kappa.tolist(), start, method="DOP853", rtol=1e-10, atol=1e-10)
    return schedule.marginal_alpha(ends[1]) * torch.tensor(solution.y[:, -1]).reshape(x_T.shape)


@pytest.mark.parametrize("schedule", [NoiseScheduleVP("linear"), NoiseScheduleVP("cosine")], ids=["linear", "cosine"])
def test_the_error_of_ddim_halves_as_steps_double(schedule: NoiseScheduleVP) -> None:
    mixture, x_T = small_mixture(schedule), normals(64, 2)
    tuner, exact = tuner_of(mixture, schedule), exact_solution(mixture, x_T)
    steps = [80, 160, 320]
    errors = [float((tuner.ddim_sample(x_T, n) - exact).norm(dim=1).mean()) for n in steps]
    slopes = -np.diff(np.log2(errors))
    assert slopes.min() > 0.9, errors
    assert slopes.max() < 1.1, errors


def test_ddim_carries_a_single_gaussian_to_its_closed_form() -> None:
    schedule, x_T = NoiseScheduleVP("linear"), normals(8, 2)
    mean, std, one = (torch.tensor(value, dtype=torch.float64) for value in ([[0.5, -1.0]], [0.3], [1.0]))
    gaussian = GaussianMixture(schedule, mean, std, one, torch.tensor([0]))
    ends = torch.tensor([[schedule.T], [schedule.t_min]], dtype=torch.float64)
    centres = schedule.marginal_alpha(ends) * mean
    stds = torch.sqrt((schedule.marginal_alpha(ends) * std) ** 2 + schedule.marginal_std(ends) ** 2)
    exact = centres[1] + stds[1] / stds[0] * (x_T - centres[0])
    errors = [float((tuner_of(gaussian, schedule).ddim_sample(x_T, n) - exact).abs().max()) for n in (100, 200, 400)]
    np.testing.assert_allclose(-np.diff(np.log2(errors)), 1.0, atol=0.1)
    assert errors[-1] < 2e-2


def calls_of(num_steps: int, schedule: NoiseScheduleVP) -> int:
    network = Recorded(small_mixture(schedule))
    assert bool(tuner_of(network, schedule).ddim_sample(normals(1, 2), num_steps).isfinite().all())
    return len(network.calls)


@pytest.mark.parametrize("limit", [1, 2, 50])
def test_num_steps_is_the_number_of_network_calls_for_every_value(limit: int) -> None:
    schedule = NoiseScheduleVP("discrete", betas=linear_betas(limit))
    every = list(range(1, limit + 1))
    assert [calls_of(num_steps, schedule) for num_steps in every] == every


@pytest.mark.parametrize("num_steps", [7, 30, 99, 100])
def test_num_steps_need_not_divide_the_training_steps(num_steps: int) -> None:
    assert calls_of(num_steps, NoiseScheduleVP("discrete", betas=linear_betas(100))) == num_steps


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_seed_gives_the_same_sample_whatever_else_is_in_the_batch(eta: float) -> None:
    model = load_builtin("digits8")
    timesteps = torch.linspace(1.0, 1e-3, 6, dtype=torch.float64)
    seeds, labels = [3, 1, 2**32 - 1, 5], torch.tensor([4, 9, 0, 4])
    guidance = Guidance("classifier-free", 2.0)
    together = generate(model, guidance, seeds, labels, timesteps, eta=eta)
    for i, seed in enumerate(seeds):
        alone = generate(model, guidance, [seed], labels[i : i + 1], timesteps, eta=eta)
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=0)


def test_initial_noise_of_a_seed_is_the_same_in_every_batch() -> None:
    together, _ = initial_noise((3, 2), [7, 8, 9])
    alone, _ = initial_noise((3, 2), [8])
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(together[0], together[1])


def test_ancestral_sampling_gives_the_mean_and_covariance_of_the_mixture() -> None:
    num_samples = 4000
    mixture = small_mixture()
    x = tuner_of(mixture, mixture.noise_schedule).ddim_sample(
        normals(num_samples, 2), num_steps=500, eta=1.0, generator=torch.Generator().manual_seed(1)
    )
    mean = mixture.weights @ mixture.means
    deviations = mixture.means - mean
    covariance = (mixture.weights * deviations.T) @ deviations
    covariance += (mixture.weights * mixture.stds**2).sum() * torch.eye(2)
    # Four standard errors: of a mean, and of the mean of the products of deviations, both taken from the samples.
    products = torch.einsum("bi,bj->bij", x - mean, x - mean)
    mean_error = 4 * x.std(dim=0) / math.sqrt(num_samples)
    covariance_error = 4 * products.std(dim=0) / math.sqrt(num_samples)
    assert bool(((x.mean(dim=0) - mean).abs() < mean_error).all())
    assert bool(((products.mean(dim=0) - covariance).abs() < covariance_error).all())


def test_intermediates_and_callback_follow_the_trajectory() -> None:
    mixture, x_T = small_mixture(), normals(3, 2)
    seen: list[tuple[int, Tensor, Tensor]] = []
    x, trajectory = tuner_of(mixture, mixture.noise_schedule).ddim_sample(
        x_T, 4, return_intermediates=True, callback=lambda *step: seen.append(step)
    )
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert [len(trajectory["x_t"]), len(trajectory["x0_pred"])] == [5, 4]
    assert torch.equal(trajectory["x_t"][0], x_T)
    assert torch.equal(trajectory["x_t"][-1], x)
    assert torch.equal(torch.stack(trajectory["x0_pred"]), torch.stack([x0 for _, _, x0 in seen]))


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        ({}, "give num_steps or timesteps"),
        ({"num_steps": 0}, "num_steps is 0; accepted: 1 to 50"),
        ({"num_steps": -3}, "num_steps is -3; accepted: 1 to 50"),
        ({"num_steps": 51}, "num_steps is 51; accepted: 1 to 50"),
        ({"num_steps": 3, "timesteps": [1.0, 0.5, 0.1]}, "num_steps is 3, but timesteps has 2 steps"),
        ({"timesteps": [1.0]}, "accepted: (num_steps + 1,), at least 2 times"),
        ({"timesteps": [[1.0, 0.5]]}, "accepted: (num_steps + 1,), at least 2 times"),
        ({"timesteps": [0.1, 0.5]}, "timesteps must fall strictly within [0, 1.0]"),
        ({"timesteps": [0.5, 0.5]}, "timesteps must fall strictly within [0, 1.0]"),
        ({"timesteps": [1.1, 0.5]}, "timesteps must fall strictly within [0, 1.0]"),
        ({"timesteps": [0.5, -0.1]}, "timesteps must fall strictly within [0, 1.0]"),
        ({"timesteps": [0.5, math.nan]}, "timesteps must fall strictly within [0, 1.0]"),
        ({"num_steps": 2, "t_ratios": [1.0]}, "t_ratios has shape (1,); accepted: (2,), one per step"),
        ({"num_steps": 2, "t_ratios": [[1.0, 1.0]]}, "t_ratios has shape (1, 2); accepted: (2,)"),
        ({"num_steps": 2, "t_ratios": [1.1, 1.0]}, "t * t_ratio must stay within (0, 1.0]"),
        ({"num_steps": 2, "t_ratios": [0.0, 1.0]}, "t * t_ratio must stay within (0, 1.0]"),
        ({"num_steps": 2, "t_ratios": [1.0, -1.0]}, "t * t_ratio must stay within (0, 1.0]"),
        ({"num_steps": 2, "t_ratios": [1.0, math.nan]}, "t * t_ratio must stay within (0, 1.0]"),
        (
            {"num_steps": 2, "eta": 1.0, "generator": [torch.Generator()]},
            "1 generators for 3 samples; accepted: one, or one per sample",
        ),
    ],
)
def test_bad_sampling_arguments_are_refused_naming_what_is_accepted(arguments: dict[str, Any], accepted: str) -> None:
    schedule = NoiseScheduleVP("discrete", betas=linear_betas(50))
    network = Recorded(small_mixture(schedule))
    with pytest.raises(ValueError, match=re.escape(accepted)):
        tuner_of(network, schedule).ddim_sample(normals(3, 2), **arguments)


def test_a_continuous_schedule_takes_any_number_of_steps_from_one() -> None:
    schedule = NoiseScheduleVP("linear")
    assert [calls_of(num_steps, schedule) for num_steps in (1, 1001)] == [1, 1001]
    with pytest.raises(ValueError, match="num_steps is 0; accepted: 1 or more"):
        calls_of(0, schedule)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_bad_seed_is_refused_naming_what_is_accepted(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}; accepted: 0 to 4294967295"):
        initial_noise((2,), [0, seed])


def test_ratios_that_overshoot_by_float32_rounding_are_taken() -> None:
    schedule = NoiseScheduleVP("linear")
    timesteps = [0.7, 0.3, 1e-3]
    ratios = (schedule.T / torch.tensor(timesteps[:-1], dtype=torch.float64)).float()
    assert bool(tuner_of(small_mixture(), schedule).ddim_sample(normals(1, 2), 2, timesteps, ratios).isfinite().all())
