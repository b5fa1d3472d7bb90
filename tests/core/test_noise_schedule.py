"""Noise schedules against diffusers, numerical integrals and finite differences."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor

from tests.core.conftest import linear_betas
from timetuner_core import NoiseScheduleVP
from timetuner_core.noise_schedule import NoiseSchedule, NoiseScheduleEDM, NoiseScheduleFlow

SCHEDULES = {
    "betas": NoiseScheduleVP("discrete", betas=linear_betas(1000)),
    "alphas_cumprod": NoiseScheduleVP(
        "discrete", alphas_cumprod=(1 - torch.linspace(1e-3, 0.4, 50, dtype=torch.float64)).cumprod(0)
    ),
    "linear": NoiseScheduleVP("linear"),
    "cosine": NoiseScheduleVP("cosine"),
}
# d sigma^2 / dt at t = 0, from the definitions: how fast each starts to add noise.
INITIAL_RATES = {
    "betas": -1000 * math.log1p(-1e-4),
    "alphas_cumprod": -50 * math.log1p(-1e-3),
    "linear": 0.1,
    "cosine": math.pi / 1.008 * math.tan(math.pi / 2 * 0.008 / 1.008),
}

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def dense_times(schedule: NoiseScheduleVP, start: float = 1e-6) -> Tensor:
    return torch.linspace(start, schedule.T, 5003, dtype=torch.float64)


@every_schedule
def test_signal_and_noise_variances_sum_to_one(schedule: NoiseScheduleVP) -> None:
    t = dense_times(schedule)
    total = schedule.marginal_alpha(t) ** 2 + schedule.marginal_std(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(t), atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_schedule
def test_time_zero_is_clean_data(schedule: NoiseScheduleVP, dtype: torch.dtype) -> None:
    zero = torch.zeros((), dtype=dtype)
    assert (schedule.marginal_alpha(zero).item(), schedule.marginal_std(zero).item()) == (1.0, 0.0)


@pytest.mark.parametrize("given_as", ["betas", "alphas_cumprod"])
@pytest.mark.parametrize(
    ("num_steps", "beta_schedule"), [(1000, "linear"), (1000, "scaled_linear"), (10, "squaredcos_cap_v2")]
)
def test_discrete_alpha_is_that_of_diffusers_at_every_training_step(
    num_steps: int, beta_schedule: str, given_as: str
) -> None:
    scheduler: Any = DDPMScheduler(num_steps, beta_schedule=beta_schedule)
    schedule = NoiseScheduleVP("discrete", **{given_as: getattr(scheduler, given_as)})
    t = torch.arange(1, num_steps + 1) / num_steps
    torch.testing.assert_close(schedule.marginal_alpha(t), scheduler.alphas_cumprod.sqrt(), atol=1e-6, rtol=0)


def test_discrete_alpha_is_the_product_of_its_betas_in_float64() -> None:
    betas = linear_betas(1000).numpy()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha = NoiseScheduleVP("discrete", betas=torch.tensor(betas)).marginal_alpha(t)
    np.testing.assert_allclose(alpha, np.sqrt(np.cumprod(1 - betas)), rtol=1e-12)


@pytest.mark.parametrize("t", [0.01, 0.3, 1.0])
def test_linear_alpha_is_the_integral_of_beta(t: float) -> None:
    integral, _ = quad(lambda s: 0.1 + s * (20.0 - 0.1), 0, t)
    log_alpha = SCHEDULES["linear"].marginal_log_mean_coeff(torch.tensor(t, dtype=torch.float64))
    assert log_alpha.item() == pytest.approx(-0.5 * integral, rel=1e-12)


def test_cosine_alpha_is_that_of_diffusers_until_its_betas_are_capped() -> None:
    scheduler: Any = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    t = torch.arange(1, 991, dtype=torch.float64) / 1000
    alpha = SCHEDULES["cosine"].marginal_alpha(t)
    torch.testing.assert_close(alpha, scheduler.alphas_cumprod[:990].double().sqrt(), atol=1e-6, rtol=0)


@every_schedule
def test_inverse_lambda_undoes_lambda_everywhere(schedule: NoiseScheduleVP) -> None:
    t = dense_times(schedule)
    torch.testing.assert_close(schedule.inverse_lambda(schedule.marginal_lambda(t)), t, atol=1e-11, rtol=0)


@every_schedule
def test_inverse_lambda_undoes_lambda_at_the_ends(schedule: NoiseScheduleVP) -> None:
    ends = torch.tensor([0.0, schedule.t_min, schedule.T], dtype=torch.float64)
    torch.testing.assert_close(schedule.inverse_lambda(schedule.marginal_lambda(ends)), ends, atol=1e-11, rtol=0)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    betas=st.lists(st.floats(1e-5, 0.5), min_size=1, max_size=20),
    fractions=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5),
)
def test_inverse_lambda_undoes_lambda_for_any_betas(betas: list[float], fractions: list[float]) -> None:
    schedule = NoiseScheduleVP("discrete", betas=torch.tensor(betas, dtype=torch.float64))
    t = torch.tensor(fractions, dtype=torch.float64)
    torch.testing.assert_close(schedule.inverse_lambda(schedule.marginal_lambda(t)), t, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sigma_keeps_its_digits_near_time_zero(name: str, dtype: torch.dtype, rtol: float) -> None:
    t = torch.logspace(-12, -8, 9, dtype=dtype)
    rate = SCHEDULES[name].marginal_std(t) ** 2 / t
    torch.testing.assert_close(rate, torch.full_like(t, INITIAL_RATES[name]), atol=0, rtol=rtol)


@pytest.mark.parametrize("method", ["marginal_log_mean_coeff", "marginal_alpha", "marginal_std", "marginal_lambda"])
@every_schedule
def test_derivatives_in_time_are_those_of_finite_differences(schedule: NoiseScheduleVP, method: str) -> None:
    between_knots = torch.tensor([3.4, 17.5, 500.3, 940.7], dtype=torch.float64, requires_grad=True)
    function = getattr(schedule, method)
    assert torch.autograd.gradcheck(lambda n: function(n / 1000), between_knots, check_forward_ad=True)


@every_schedule
def test_lambda_falls_strictly(schedule: NoiseScheduleVP) -> None:
    assert bool((schedule.marginal_lambda(dense_times(schedule)).diff() < 0).all())


@pytest.mark.parametrize("shape", [(), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["marginal_alpha", "marginal_std", "marginal_lambda", "inverse_lambda"])
@every_schedule
def test_results_have_the_dtype_and_shape_of_their_argument(
    schedule: NoiseScheduleVP, method: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    result = getattr(schedule, method)(torch.full(shape, 0.3, dtype=dtype))
    assert (result.dtype, result.shape) == (dtype, shape)


def test_beyond_the_last_training_step_the_last_piece_goes_on() -> None:
    t = torch.tensor([0.999, 1.0, 1.001], dtype=torch.float64)
    log_alpha = SCHEDULES["betas"].marginal_log_mean_coeff(t)
    assert (log_alpha[2] - log_alpha[1]).item() == pytest.approx((log_alpha[1] - log_alpha[0]).item(), rel=1e-9)


@pytest.mark.parametrize("num_steps", [50, 1000])
def test_a_discrete_network_is_fed_the_numbers_of_its_training_steps(num_steps: int) -> None:
    schedule = NoiseScheduleVP("discrete", betas=linear_betas(num_steps))
    t = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    t_input = schedule.model_input_time(t)
    torch.testing.assert_close(t_input, torch.arange(num_steps, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(schedule.time_of_model_input(t_input), t, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_continuous_network_is_fed_time_itself(name: str) -> None:
    t = dense_times(SCHEDULES[name])
    assert torch.equal(SCHEDULES[name].model_input_time(t), t)


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        ({"schedule": "sigmoid"}, "accepted: 'discrete', 'linear', 'cosine'"),
        ({}, "takes one of betas and alphas_cumprod"),
        ({"betas": torch.tensor([0.1]), "alphas_cumprod": torch.tensor([0.9])}, "one of betas and alphas_cumprod"),
        ({"betas": torch.tensor([])}, "shape (N,) with every value inside (0, 1)"),
        ({"betas": torch.tensor([[0.1, 0.2]])}, "shape (N,) with every value inside (0, 1)"),
        ({"betas": torch.tensor([0.0, 0.1])}, "every value inside (0, 1)"),
        ({"betas": torch.tensor([0.1, -0.1])}, "every value inside (0, 1)"),
        ({"betas": torch.tensor([0.1, 1.0])}, "every value inside (0, 1)"),
        ({"betas": torch.tensor([0.1, math.nan])}, "every value inside (0, 1)"),
        ({"alphas_cumprod": torch.tensor([])}, "shape (N,)"),
        ({"alphas_cumprod": torch.tensor([[0.9, 0.5]])}, "shape (N,)"),
        ({"alphas_cumprod": torch.tensor([0.5, 0.9])}, "fall strictly inside (0, 1)"),
        ({"alphas_cumprod": torch.tensor([0.5, 0.5])}, "fall strictly inside (0, 1)"),
        ({"alphas_cumprod": torch.tensor([1.0, 0.5])}, "fall strictly inside (0, 1)"),
        ({"alphas_cumprod": torch.tensor([0.5, 0.0])}, "fall strictly inside (0, 1)"),
        ({"alphas_cumprod": torch.tensor([math.nan])}, "fall strictly inside (0, 1)"),
    ],
)
def test_a_bad_schedule_is_refused_naming_what_is_accepted(arguments: dict[str, Any], accepted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(accepted)):
        NoiseScheduleVP(**arguments)


OTHER_SCHEDULES: dict[str, NoiseSchedule] = {
    "flow": NoiseScheduleFlow(),
    "flow, shifted": NoiseScheduleFlow(shift=3.0),
    "edm": NoiseScheduleEDM(),
}
every_other_schedule = pytest.mark.parametrize("schedule", OTHER_SCHEDULES.values(), ids=OTHER_SCHEDULES)


def between_the_ends(schedule: NoiseSchedule) -> Tensor:
    """Short of T, where flow matching's alpha stops falling."""
    return torch.linspace(schedule.t_min, 0.999 * schedule.T, 5003, dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_mixes_data_and_noise_along_a_line_at_the_sigmas_of_diffusers(shift: float) -> None:
    schedule, t = NoiseScheduleFlow(shift), torch.linspace(1.0, 0.1, 10, dtype=torch.float64)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=t.tolist())
    torch.testing.assert_close(schedule.marginal_std(t), scheduler.sigmas[:-1].double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.model_input_time(t), scheduler.timesteps.double(), atol=1e-3, rtol=0)
    total = schedule.marginal_alpha(t) + schedule.marginal_std(t)
    torch.testing.assert_close(total, torch.ones_like(t), atol=1.1e-6, rtol=0)
    assert bool(schedule.marginal_lambda(t).isfinite().all())


def test_edm_adds_noise_of_standard_deviation_t_and_feeds_what_diffusers_feeds() -> None:
    schedule = OTHER_SCHEDULES["edm"]
    scheduler: Any = EDMEulerScheduler()
    sigmas = scheduler.sigmas[:-1].double()
    assert torch.equal(schedule.marginal_std(sigmas), sigmas)
    assert torch.equal(schedule.marginal_alpha(sigmas), torch.ones_like(sigmas))
    torch.testing.assert_close(schedule.model_input_time(sigmas), scheduler.timesteps.double(), atol=1e-6, rtol=0)
    assert (schedule.T, schedule.t_min, schedule.prior_std) == (80.0, 0.002, 80.0)


@every_other_schedule
def test_every_schedule_inverts_its_lambda_and_its_input_time(schedule: NoiseSchedule) -> None:
    t = between_the_ends(schedule)
    lambda_t = schedule.marginal_lambda(t)
    assert bool((lambda_t.diff() < 0).all())
    torch.testing.assert_close(schedule.inverse_lambda(lambda_t), t, atol=0, rtol=1e-11)
    torch.testing.assert_close(schedule.time_of_model_input(schedule.model_input_time(t)), t, atol=0, rtol=1e-11)


@pytest.mark.parametrize("method", ["marginal_alpha", "marginal_std", "marginal_lambda", "model_input_time"])
@every_other_schedule
def test_every_schedule_is_differentiable_in_time(schedule: NoiseSchedule, method: str) -> None:
    t = (schedule.T * torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(getattr(schedule, method), t, check_forward_ad=True)


@every_other_schedule
def test_every_schedule_is_clean_data_at_time_zero(schedule: NoiseSchedule) -> None:
    zero = torch.zeros((), dtype=torch.float64)
    assert (schedule.marginal_alpha(zero).item(), schedule.marginal_std(zero).item()) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("schedule_class", "arguments", "accepted"),
    [
        (NoiseScheduleFlow, {"shift": 0.0}, "shift is 0.0, num_train_timesteps is 1000; accepted: above 0"),
        (NoiseScheduleFlow, {"shift": math.nan}, "accepted: above 0"),
        (NoiseScheduleFlow, {"num_train_timesteps": 0}, "num_train_timesteps is 0; accepted: above 0"),
        (NoiseScheduleEDM, {"sigma_min": 0.0}, "accepted: 0 < sigma_min < sigma_max"),
        (NoiseScheduleEDM, {"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min is 2.0, sigma_max is 1.0; accepted: 0 <"),
    ],
)
def test_a_bad_flow_or_edm_schedule_is_refused(schedule_class: Any, arguments: dict[str, Any], accepted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(accepted)):
        schedule_class(**arguments)
