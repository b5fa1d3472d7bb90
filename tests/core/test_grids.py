"""Time grids: the number of steps, the ends, and what is spaced evenly."""

import re
from typing import Any, get_args

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from tests.core.conftest import linear_betas
from timetuner_core import NoiseScheduleVP
from timetuner_core.catalog import GridName
from timetuner_core.grids import check_t_ratios, make_timesteps, start_grids
from timetuner_core.noise_schedule import NoiseSchedule, NoiseScheduleEDM, NoiseScheduleFlow

SCHEDULES: dict[str, NoiseSchedule] = {
    "discrete": NoiseScheduleVP("discrete", betas=linear_betas(60)),
    "linear": NoiseScheduleVP("linear"),
    "cosine": NoiseScheduleVP("cosine"),
    "flow": NoiseScheduleFlow(shift=3.0),
    "edm": NoiseScheduleEDM(),
}

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_grid = pytest.mark.parametrize("grid", get_args(GridName))


def spaced_evenly(schedule: NoiseSchedule, timesteps: Tensor, grid: str) -> Tensor:
    """The quantity that a grid spaces evenly, by its definition."""
    if grid == "default":
        grid = "edm" if isinstance(schedule, NoiseScheduleEDM) else "uniform"
    if grid == "log_snr":
        return torch.log(schedule.marginal_alpha(timesteps) / schedule.marginal_std(timesteps))
    if grid == "edm":
        return (schedule.marginal_std(timesteps) / schedule.marginal_alpha(timesteps)) ** (1 / 7)
    return timesteps if grid == "uniform" else timesteps.sqrt()


@every_grid
@every_schedule
def test_a_grid_has_its_number_of_steps_and_falls_from_end_to_end(schedule: NoiseSchedule, grid: Any) -> None:
    for num_steps in range(1, 61):
        timesteps = make_timesteps(schedule, num_steps, grid)
        assert (timesteps.shape, timesteps.dtype) == ((num_steps + 1,), torch.float64)
        assert (timesteps[0].item(), timesteps[-1].item()) == (schedule.T, schedule.t_min)
        assert bool((timesteps.diff() < 0).all()), num_steps


@every_grid
@every_schedule
def test_a_grid_spaces_evenly_what_it_is_named_after(schedule: NoiseSchedule, grid: Any) -> None:
    timesteps = make_timesteps(schedule, 17, grid)
    if float(schedule.marginal_lambda(timesteps[1])) == pytest.approx(-5.1):
        timesteps = timesteps[1:]  # the first step is over what tells nothing of x0
    differences = spaced_evenly(schedule, timesteps, grid).diff()
    torch.testing.assert_close(differences, differences.mean().expand_as(differences), rtol=1e-8, atol=0)


def cosine_alphas_cumprod(N: int) -> Tensor:
    """Those of diffusers' `squaredcos_cap_v2`."""
    return DDPMScheduler(N, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("grid", ["log_snr", "edm"])
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseScheduleFlow(),
        NoiseScheduleFlow(num_train_timesteps=10),
        NoiseScheduleVP(alphas_cumprod=cosine_alphas_cumprod(1000)),
    ],
    ids=["flow", "flow of 10 steps", "cosine"],
)
def test_a_grid_in_log_snr_spends_one_step_where_there_is_no_signal(schedule: NoiseSchedule, grid: Any) -> None:
    assert schedule.marginal_lambda(torch.tensor(1.0, dtype=torch.float64)) < -9
    for num_steps in (1, 2, 3, 10, 50):
        timesteps = make_timesteps(schedule, num_steps, grid)
        lambdas = schedule.marginal_lambda(timesteps)
        assert (len(timesteps), timesteps[0].item()) == (num_steps + 1, 1.0)
        assert bool((timesteps.diff() < 0).all())
        assert bool((lambdas[1:] > -5.1 - 1e-6).all())


def test_a_grid_in_log_snr_is_even_where_no_step_is_wholly_without_signal() -> None:
    schedule = NoiseScheduleVP("discrete", betas=linear_betas(60))
    timesteps = make_timesteps(schedule, 5, "log_snr")
    lambdas = schedule.marginal_lambda(timesteps)
    assert lambdas[0] < -5.1 < lambdas[1]
    torch.testing.assert_close(lambdas.diff(), lambdas.diff().mean().expand(5))


@every_grid
def test_a_network_of_one_training_step_goes_to_clean_data(grid: Any) -> None:
    schedule = NoiseScheduleVP("discrete", betas=linear_betas(1))
    assert make_timesteps(schedule, 1, grid).tolist() == [1.0, 0.0]


@every_schedule
def test_ratios_keep_the_network_within_the_times_it_knows(schedule: NoiseSchedule) -> None:
    grid = make_timesteps(schedule, 5)
    t = grid[:-1]
    lowest, highest = schedule.t_min / t, schedule.T / t
    for ratios in (lowest, highest, torch.ones(5)):
        told = schedule.model_input_time(t * check_t_ratios(schedule, grid, ratios))
        ends = schedule.model_input_time(torch.tensor([schedule.t_min, schedule.T], dtype=torch.float64))
        assert bool(((told >= ends[0] - 1e-9) & (told <= ends[1] + 1e-9)).all())
    for beyond in (0.99 * lowest, 1e-6 * torch.ones(5), 1.01 * highest):
        with pytest.raises(ValueError, match="t \\* t_ratio must"):
            check_t_ratios(schedule, grid, beyond)


def test_a_time_below_the_networks_first_is_told_as_it_is() -> None:
    schedule = NoiseScheduleVP("linear")
    assert check_t_ratios(schedule, torch.tensor([1.0, 1e-4, 0.0]), [1.0, 1.0]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@every_schedule
def test_ratios_of_low_precision_stay_within_the_bounds_that_they_were_rounded_over(
    schedule: NoiseSchedule, dtype: torch.dtype
) -> None:
    grid = make_timesteps(schedule, 7)
    t = grid[:-1]
    for bound in (schedule.t_min, schedule.T):
        exact = (bound / t).clamp(min=torch.finfo(dtype).tiny)  # numbers below have fewer digits
        used = check_t_ratios(schedule, grid, exact.to(dtype))
        assert used.dtype == torch.float64
        assert bool((t * used <= schedule.T * (1 + 1e-15)).all())
        assert bool((t * used >= schedule.t_min * (1 - 1e-15)).all())
        torch.testing.assert_close(used, exact, rtol=torch.finfo(dtype).eps, atol=0)


@every_grid
@pytest.mark.parametrize(("N", "num_steps"), [(1000, 999), (1000, 1000), (400, 400), (400, 5)])
def test_grids_of_as_many_steps_as_the_network_was_trained_on_call_it_at_its_own_times(
    N: int, num_steps: int, grid: Any
) -> None:
    schedule = NoiseScheduleVP("discrete", betas=linear_betas(N))
    timesteps = make_timesteps(schedule, num_steps, grid)
    told = schedule.model_input_time(timesteps)
    assert (len(timesteps), told[0].item()) == (num_steps + 1, pytest.approx(N - 1))
    assert told[-1].item() == pytest.approx(0, abs=1e-9)
    assert bool((timesteps.diff() < 0).all())
    with pytest.raises(ValueError, match=f"accepted: 1 to {N}"):
        make_timesteps(schedule, N + 1, grid)


@pytest.mark.parametrize(
    ("schedule", "num_steps", "grid", "accepted"),
    [
        ("linear", 0, "uniform", "num_steps is 0; accepted: 1 or more"),
        ("flow", -1, "edm", "num_steps is -1; accepted: 1 or more"),
        ("discrete", 61, "log_snr", "num_steps is 61; accepted: 1 to 60"),
        ("linear", 5, "karras", "grid is 'karras'; accepted: default, uniform, quadratic, log_snr, edm"),
    ],
)
def test_a_bad_grid_is_refused_naming_what_is_accepted(schedule: str, num_steps: int, grid: Any, accepted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(accepted)):
        make_timesteps(SCHEDULES[schedule], num_steps, grid)


@every_schedule
def test_the_grids_to_start_from_are_all_named_ones_without_repeats(schedule: NoiseSchedule) -> None:
    starts = [tuple(grid.tolist()) for grid in start_grids(schedule, 5)]
    named = {tuple(make_timesteps(schedule, 5, name).tolist()) for name in get_args(GridName)}
    assert sorted(starts) == sorted(named)
