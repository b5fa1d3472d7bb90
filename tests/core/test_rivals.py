"""Rival grids: shortest paths, costs and bounds against closed forms, and grids that serve better than named ones."""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from diffusers.schedulers import AysSchedules
from scipy.optimize import minimize  # type: ignore[import-untyped]
from torch import Tensor

from tests.core.conftest import DEVICES, Recorded, crossed, linear_betas, normals, small_mixture
from timetuner_core import NoiseScheduleVP, model_wrapper
from timetuner_core.catalog import GridName
from timetuner_core.grids import make_timesteps
from timetuner_core.models.mixtures import GaussianMixture, gratings_mixture, ring_mixture
from timetuner_core.noise_schedule import NoiseSchedule, NoiseScheduleEDM, NoiseScheduleFlow
from timetuner_core.rivals.ays import ays_timesteps, kl_bound_costs
from timetuner_core.rivals.ays_list import PUBLISHED_LEVELS, ays_list_timesteps
from timetuner_core.rivals.candidates import candidate_timesteps, dp_path
from timetuner_core.rivals.dmn import WEIGHTS_OF, dmn_bound, dmn_timesteps, x0_weights
from timetuner_core.rivals.gits import gits_timesteps, trajectory_costs
from timetuner_core.rivals.oss import oss_timesteps
from timetuner_core.samplers import SAMPLERS, sample
from timetuner_core.tuners import OssTuner, TunedSetting
from timetuner_core.tuning.problem import TuningProblem

SCHEDULES: dict[str, NoiseSchedule] = {
    "discrete": NoiseScheduleVP("discrete", betas=linear_betas(1000)),
    "linear": NoiseScheduleVP("linear"),
    "cosine": NoiseScheduleVP("cosine"),
    "flow": NoiseScheduleFlow(shift=3.0),
    "edm": NoiseScheduleEDM(),
}
LINEAR, EDM = SCHEDULES["linear"], SCHEDULES["edm"]
RIVALS: dict[str, Callable[..., Tensor]] = {
    "ays": ays_timesteps,
    "ays_list": ays_list_timesteps,
    "gits": gits_timesteps,
    "oss": oss_timesteps,
    "dmn": dmn_timesteps,
}
NAMED = [name for name in get_args(GridName) if name != "default"]

every_rival = pytest.mark.parametrize("rival", RIVALS.values(), ids=RIVALS)


def gaussian(schedule: NoiseSchedule, std: float = 0.5, dimension: int = 2) -> GaussianMixture:
    return GaussianMixture(
        schedule,
        means=torch.zeros(1, dimension, dtype=torch.float64),
        stds=torch.tensor([std], dtype=torch.float64),
        weights=torch.ones(1, dtype=torch.float64),
        classes=torch.zeros(1, dtype=torch.long),
    )


def problem_of(
    mixture: GaussianMixture, population: Tensor, timesteps: Tensor | int, sampler: str = "ddim", **fields: Any
) -> TuningProblem:
    schedule = mixture.noise_schedule
    model_fn = model_wrapper(mixture, schedule)
    grid = make_timesteps(schedule, timesteps) if isinstance(timesteps, int) else timesteps
    step_fn = SAMPLERS[sampler].step_fn(model_fn, schedule)
    return TuningProblem(model_fn, schedule, step_fn, grid, population, **fields)


def data_of(mixture: GaussianMixture, size: int = 64) -> Tensor:
    return mixture.sample(size, torch.Generator().manual_seed(0))[0].double()


def noise_of(mixture: GaussianMixture, size: int = 64, seed: int = 0) -> Tensor:
    return mixture.noise_schedule.prior_std * normals(size, *mixture.sample_shape, seed=seed)


def noise_to_signal(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    return schedule.marginal_std(timesteps) / schedule.marginal_alpha(timesteps)


def path_cost(cost: Tensor, path: list[int], discount: float = 1.0) -> float:
    return sum(discount**k * float(cost[i, j]) for k, (i, j) in enumerate(itertools.pairwise(path)))


def every_path(size: int, num_steps: int) -> list[list[int]]:
    return [[0, *inner, size - 1] for inner in itertools.combinations(range(1, size - 1), num_steps - 1)]


# The shortest path


@pytest.mark.parametrize("discount", [0.8, 1.0, 1.15])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 7])
def test_the_path_is_the_best_of_all_with_as_many_hops(num_steps: int, discount: float) -> None:
    for seed in range(5):
        cost = normals(8, 8, seed=seed).abs()
        path = dp_path(cost, num_steps, discount)
        best = min(path_cost(cost, other, discount) for other in every_path(8, num_steps))
        assert path in every_path(8, num_steps)
        assert path_cost(cost, path, discount) == pytest.approx(best, rel=1e-12)


def test_the_path_avoids_hops_of_infinite_cost() -> None:
    cost = torch.ones(5, 5)
    cost[0, 1:4] = torch.tensor([torch.inf, 9.0, torch.inf])
    assert dp_path(cost, 2) == [0, 2, 4]


# Any rival's grid


@crossed(rival=RIVALS, schedule=SCHEDULES)
def test_a_rivals_grid_falls_strictly_between_the_problems_ends(
    schedule: NoiseSchedule, rival: Callable[..., Tensor]
) -> None:
    mixture = gaussian(schedule)
    last = 3 * schedule.t_min
    few: dict[str, int] = {} if rival in (dmn_timesteps, ays_list_timesteps) else {"num_candidates": 12}
    for num_steps in (1, 2, 6):
        named = make_timesteps(schedule, num_steps)
        to_later = torch.cat([named[:-1], named.new_tensor([last])])
        for grid in (named, to_later, torch.cat([to_later, to_later.new_zeros(1)]), named.new_tensor([schedule.T, 0])):
            timesteps = rival(problem_of(mixture, noise_of(mixture, 4), grid, batch_size=64), **few)
            assert (timesteps.shape, timesteps.dtype) == (grid.shape, torch.float64)
            assert (timesteps[0], timesteps[-1]) == (grid[0], grid[-1])
            assert bool((timesteps.diff() < 0).all())
            if grid[-1] == 0:
                assert timesteps[-2] == grid[-2]


@every_rival
def test_the_seed_alone_decides_the_grid(rival: Callable[..., Tensor]) -> None:
    mixture = ring_mixture()
    problem = problem_of(mixture, data_of(mixture), 5)
    first = rival(problem)
    torch.randn(3)
    assert torch.equal(rival(problem), first)


def test_another_seed_draws_other_noise() -> None:
    problem = problem_of(ring_mixture(), data_of(ring_mixture()), 5)
    candidates = candidate_timesteps(problem, 20)
    costs = [kl_bound_costs(dataclasses.replace(problem, seed=seed), candidates, 32) for seed in (0, 1)]
    assert not torch.equal(*costs)


@pytest.mark.parametrize("rival", ["ays", "gits"])
def test_the_networks_calls_do_not_grow_with_the_number_of_steps(rival: str) -> None:
    counts = []
    for num_steps in (2, 8):
        network = Recorded(small_mixture())
        problem = problem_of(small_mixture(), normals(32, 2), num_steps)
        problem = dataclasses.replace(problem, model_fn=model_wrapper(network, LINEAR))
        RIVALS[rival](problem)
        counts.append(len(network.calls))
    assert counts[0] == counts[1] <= 61 * 4


@pytest.mark.parametrize("rival", ["ays", "gits", "oss"])
def test_a_rival_sees_the_guided_model(rival: str) -> None:
    mixture = small_mixture()
    model_fn = model_wrapper(mixture, LINEAR, guidance_type="classifier-free", guidance_scale=3.0)
    null = torch.full((4,), mixture.null_class_label)
    problem = TuningProblem(
        model_fn,
        LINEAR,
        SAMPLERS["ddim"].step_fn(model_fn, LINEAR),
        make_timesteps(LINEAR, 4),
        normals(10, 2),
        condition=torch.arange(10) % 2,
        batch_size=4,
        step_kwargs={"uncond_condition": null},
    )
    unguided = dataclasses.replace(problem, model_fn=dataclasses.replace(model_fn, guidance_scale=1.0))
    assert not torch.equal(RIVALS[rival](problem), RIVALS[rival](unguided))


@every_rival
@pytest.mark.parametrize("device", DEVICES)
def test_a_rival_works_where_the_population_is(device: str, rival: Callable[..., Tensor]) -> None:
    mixture = ring_mixture()
    on_cpu = rival(problem_of(mixture, data_of(mixture).float(), 5, batch_size=64))
    timesteps = rival(problem_of(mixture.to(device), data_of(mixture).float().to(device), 5, batch_size=64))
    assert timesteps.device.type == "cpu"
    torch.testing.assert_close(timesteps, on_cpu)


# AYS


def gaussian_kl_bound(sigma: Tensor, std: float, dimension: int) -> Tensor:
    """AYS's bound on Gaussian data on a grid of falling sigmas, by quadrature of the closed form."""
    total = torch.zeros((), dtype=torch.float64)
    for s_i, s_j in itertools.pairwise(sigma):
        log_s = torch.linspace(0, 1, 2001, dtype=torch.float64) * (s_j / s_i).log() + s_i.log()
        s = log_s.exp()
        distance = std**4 * (s_i**2 - s**2) / ((std**2 + s**2) * (std**2 + s_i**2))
        total = total - torch.trapezoid(distance / s**2, log_s)
    return dimension * total


@pytest.mark.parametrize("schedule", [LINEAR, EDM], ids=["linear", "edm"])
def test_the_estimated_kl_bound_is_that_of_gaussian_data(schedule: NoiseSchedule) -> None:
    std, dimension = 0.5, 16
    mixture = gaussian(schedule, std, dimension)
    problem = problem_of(mixture, data_of(mixture, 512), 5)
    candidates = candidate_timesteps(problem, 60)
    cost = kl_bound_costs(problem, candidates, num_samples=256)
    sigma = noise_to_signal(schedule, candidates)
    for i, j in [(0, 30), (5, 59), (20, 40), (30, 31), (50, 59)]:
        exact = gaussian_kl_bound(sigma[[i, j]], std, dimension)
        torch.testing.assert_close(cost[i, j], exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("num_steps", [3, 8])
def test_ays_finds_the_optimum_of_the_kl_bound_on_gaussian_data(num_steps: int) -> None:
    std, dimension = 0.5, 8
    mixture = gaussian(EDM, std, dimension)
    sigma = ays_timesteps(problem_of(mixture, data_of(mixture, 512), num_steps), num_candidates=120, num_samples=128)

    def bound(inner: Any) -> float:
        log_sigma = torch.cat([sigma[:1].log(), torch.as_tensor(inner), sigma[-1:].log()])
        return float(gaussian_kl_bound(log_sigma.exp(), std, dimension)) if bool((log_sigma.diff() < 0).all()) else 1e9

    least = minimize(bound, sigma[1:-1].log().numpy(), method="Nelder-Mead", options={"maxiter": 400}).fun
    found = bound(sigma[1:-1].log())
    assert found < 1.02 * least
    for name in NAMED:
        assert found < 0.9 * bound(make_timesteps(EDM, num_steps, name)[1:-1].log())


@pytest.mark.parametrize("make_mixture", [ring_mixture, gratings_mixture])
def test_ays_lowers_the_kl_bound_below_that_of_every_named_grid(make_mixture: Callable[[], GaussianMixture]) -> None:
    mixture = make_mixture()
    problem = problem_of(mixture, data_of(mixture, 256), 6)
    grids = {name: make_timesteps(LINEAR, 6, name) for name in NAMED} | {"ays": ays_timesteps(problem)}
    candidates = torch.cat([candidate_timesteps(problem, 60), *grids.values()]).sort(descending=True).values
    candidates = candidates[torch.cat([candidates[:1] > 0, candidates.diff() < 0])]
    held_out = kl_bound_costs(dataclasses.replace(problem, seed=1), candidates, 128)
    bounds = {
        name: path_cost(held_out, [int((candidates == t).nonzero()) for t in grid]) for name, grid in grids.items()
    }
    assert min(bounds, key=lambda name: bounds[name]) == "ays"


# AYS's published lists


def test_the_published_levels_are_those_of_diffusers_at_the_times_that_it_ships() -> None:
    for name, ours in (("StableDiffusion", "sd15"), ("StableDiffusionXL", "sdxl"), ("StableDiffusionVideo", "svd")):
        assert PUBLISHED_LEVELS[ours] == pytest.approx(AysSchedules[f"{name}Sigmas"][:-1])  # type: ignore[index]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    mixture = gaussian(NoiseScheduleVP("discrete", betas=betas))
    told = mixture.noise_schedule.model_input_time(ays_list_timesteps(problem_of(mixture, noise_of(mixture, 4), 10)))
    shipped = AysSchedules["StableDiffusionTimesteps"]
    torch.testing.assert_close(told[:-1], torch.tensor(shipped, dtype=torch.float64), atol=1.5, rtol=0)


def test_a_published_list_is_interpolated_between_its_logarithms() -> None:
    mixture = gaussian(LINEAR)
    grid = ays_list_timesteps(problem_of(mixture, noise_of(mixture, 4), 20), "sdxl")
    levels = noise_to_signal(LINEAR, grid)
    torch.testing.assert_close(levels[2:19:2], torch.tensor(PUBLISHED_LEVELS["sdxl"][1:], dtype=torch.float64))
    torch.testing.assert_close(levels[3], (levels[2] * levels[4]).sqrt())


# GITS


def ddim_error(mixture: GaussianMixture, timesteps: Tensor) -> float:
    """Mean distance of DDIM's samples from a many-step teacher's, on noise of its own."""
    noise, schedule = noise_of(mixture, 256, seed=9), mixture.noise_schedule
    step_fn = SAMPLERS["ddim"].step_fn(model_wrapper(mixture, schedule), schedule)
    teacher = SAMPLERS["dpmpp_2m"].step_fn(step_fn.model_fn, schedule)
    ones = torch.ones(200, dtype=torch.float64)
    with torch.no_grad():
        found = sample(step_fn, noise, timesteps, ones[: len(timesteps) - 1])
        exact = sample(teacher, noise, make_timesteps(schedule, 200, "log_snr"), ones)
    return float(torch.linalg.vector_norm((found - exact).flatten(1), dim=1).mean())


@pytest.mark.parametrize("name", ["linear", "edm"])
def test_gits_measures_each_step_against_the_trajectory(name: str) -> None:
    schedule, std = SCHEDULES[name], 0.5
    mixture = gaussian(schedule, std)
    noise = noise_of(mixture, 10)
    problem = problem_of(mixture, noise, 3, batch_size=4)
    candidates = candidate_timesteps(problem, 12)
    sigma = noise_to_signal(schedule, candidates)

    def stepped(i: int, j: int) -> Tensor:  # x / alpha grows by this factor, on Gaussian data
        return 1 + (sigma[j] - sigma[i]) * sigma[i] / (std**2 + sigma[i] ** 2)

    length = torch.linalg.vector_norm(noise / schedule.marginal_alpha(candidates[0]), dim=1).mean()
    reached = [length]
    for i in range(len(candidates) - 1):
        reached.append(reached[-1] * stepped(i, i + 1))
    exact = torch.zeros(len(candidates), len(candidates), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(candidates)), 2):
        exact[i, j] = (reached[i] * stepped(i, j) - reached[j]).abs()
    torch.testing.assert_close(trajectory_costs(problem, candidates, 256), exact, atol=1e-9, rtol=1e-9)

    paths = every_path(len(candidates), 3)
    best = min(paths, key=lambda path: path_cost(exact, path, 1.15))
    assert torch.equal(gits_timesteps(problem, num_candidates=12), candidates[best])


def test_on_gaussian_data_gits_serves_ddim_better_than_named_grids_and_no_better_than_the_optimum() -> None:
    std, num_steps = 0.5, 6
    mixture = gaussian(EDM, std)
    ends = torch.tensor([EDM.T, EDM.t_min], dtype=torch.float64)
    first, last = torch.atan(ends / std)
    # DDIM's own optimum here, AYS's closed form: even in arctan(sigma / std).
    angles = torch.linspace(float(first), float(last), num_steps + 1, dtype=torch.float64)
    optimum = std * torch.tan(angles)
    optimum[[0, -1]] = ends
    error = ddim_error(mixture, gits_timesteps(problem_of(mixture, noise_of(mixture), num_steps)))
    assert ddim_error(mixture, optimum) <= error
    assert error < 0.6 * min(ddim_error(mixture, make_timesteps(EDM, num_steps, name)) for name in NAMED)


@crossed(num_steps=[5, 10], make_mixture=[ring_mixture, gratings_mixture])
def test_gits_serves_ddim_better_than_even_grids(num_steps: int, make_mixture: Callable[[], GaussianMixture]) -> None:
    mixture = make_mixture()
    error = ddim_error(mixture, gits_timesteps(problem_of(mixture, noise_of(mixture), num_steps)))
    for name in ("uniform", "log_snr", "edm"):
        assert error < ddim_error(mixture, make_timesteps(LINEAR, num_steps, name))


def test_gits_uses_no_more_samples_than_asked() -> None:
    few = problem_of(small_mixture(), normals(8, 2), 5)
    many = problem_of(small_mixture(), torch.cat([normals(8, 2), 5 * normals(8, 2, seed=1)]), 5)
    candidates = candidate_timesteps(few, 20)
    torch.testing.assert_close(trajectory_costs(many, candidates, 8), trajectory_costs(few, candidates, 256))


# OSS


def ddim_distance(problem: TuningProblem, candidates: Tensor, timesteps: Tensor) -> float:
    """How far DDIM's samples on a grid end from those on all candidates, from the problem's noise."""
    ends = [
        sample(problem.step_fn, problem.population, grid, torch.ones(len(grid) - 1, dtype=torch.float64))
        for grid in (timesteps, candidates)
    ]
    return float((ends[0] - ends[1]).norm(dim=1).mean())


@pytest.mark.parametrize("name", ["linear", "flow", "edm"])
def test_with_two_steps_oss_finds_the_candidate_by_which_ddim_ends_nearest(name: str) -> None:
    mixture = gaussian(SCHEDULES[name]) if name != "linear" else small_mixture()
    problem = problem_of(mixture, noise_of(mixture, 10), 2, batch_size=4)
    candidates = candidate_timesteps(problem, 12)
    paths = [candidates[path] for path in every_path(len(candidates), 2)]
    best = min(paths, key=lambda timesteps: ddim_distance(problem, candidates, timesteps))
    assert torch.equal(oss_timesteps(problem, num_candidates=12), best)


@crossed(num_steps=[5, 10], make_mixture=[ring_mixture, gratings_mixture])
def test_oss_serves_ddim_better_than_even_grids(num_steps: int, make_mixture: Callable[[], GaussianMixture]) -> None:
    mixture = make_mixture()
    error = ddim_error(mixture, oss_timesteps(problem_of(mixture, noise_of(mixture), num_steps)))
    for name in ("uniform", "log_snr", "edm"):
        assert error < ddim_error(mixture, make_timesteps(LINEAR, num_steps, name))


def test_oss_puts_each_sample_through_the_network_once_per_candidate_and_step_at_most() -> None:
    network = Recorded(small_mixture())
    problem = problem_of(small_mixture(), normals(40, 2), 5)
    problem = dataclasses.replace(problem, model_fn=model_wrapper(network, LINEAR))
    oss_timesteps(problem, num_candidates=20, num_samples=10)
    tuner = OssTuner(objective="oss", num_candidates=20, population_size=10)
    assert sum(network.batch_sizes) <= tuner.network_samples(TunedSetting(5))


# DMN


@crossed(sampler=[name for name, s in SAMPLERS.items() if not s.stochastic], schedule_name=["linear", "flow", "edm"])
def test_a_sample_is_the_weighted_sum_of_what_the_network_said(sampler: str, schedule_name: str) -> None:
    schedule = SCHEDULES[schedule_name]
    mixture = gaussian(schedule)
    said = []

    def network(x: Tensor, t_input: Tensor) -> Tensor:
        said.append(model_wrapper(mixture, schedule).predict(x, schedule.time_of_model_input(t_input)).x0)
        return said[-1]

    step_fn = SAMPLERS[sampler].step_fn(model_wrapper(network, schedule, "x_start"), schedule)
    grid = make_timesteps(schedule, 6, "edm")
    x_T = noise_of(mixture, 4)
    if schedule_name == "flow":
        grid[0] = 0.95  # A start without any signal magnifies rounding a million times.
    result = sample(step_fn, x_T, grid, torch.ones(6, dtype=torch.float64))
    weights, times, weight_of_noise = x0_weights(step_fn, grid)
    weighted = weight_of_noise * x_T + torch.einsum("c,c...->...", weights.sum(dim=0), torch.stack(said))
    assert weights.shape == (6, len(said)) and times.shape == (len(said),)
    torch.testing.assert_close(weighted, result, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_weight_belongs_to_a_call_made_at_its_time(sampler: str) -> None:
    network = Recorded(small_mixture())
    step_fn = SAMPLERS[sampler].step_fn(model_wrapper(network, LINEAR), LINEAR)
    grid = make_timesteps(LINEAR, 5)
    sample(step_fn, normals(1, 2), grid, torch.ones(5, dtype=torch.float64))
    assert x0_weights(step_fn, grid)[1].tolist() == pytest.approx(network.times)


@crossed(sampler=["ddim", "dpmpp_3m", "unipc_3", "heun"], schedule_name=["linear", "discrete", "edm", "flow"])
def test_dmns_bound_has_an_exact_gradient(sampler: str, schedule_name: str) -> None:
    schedule = SCHEDULES[schedule_name]
    grid = make_timesteps(schedule, 6, "quadratic")  # off the kinks of discrete log alpha
    problem = problem_of(gaussian(schedule), normals(1, 2), grid, sampler)
    timesteps = grid.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dmn_bound(problem, timesteps), timesteps)
    for k in range(1, 6):
        delta = torch.zeros_like(grid)
        delta[k] = 1e-6 * grid[k]
        difference = (dmn_bound(problem, grid + delta) - dmn_bound(problem, grid - delta)) / (2 * delta[k])
        torch.testing.assert_close(gradient[k], difference, rtol=1e-4, atol=1e-7)


@crossed(sampler=list(SAMPLERS), power=[1.0, 2.0])
def test_dmns_grid_has_a_lower_bound_than_every_named_one(sampler: str, power: float) -> None:
    problem = problem_of(small_mixture(), normals(1, 2), 5, sampler)
    bound = float(dmn_bound(problem, dmn_timesteps(problem, power), power))
    named = {name: float(dmn_bound(problem, make_timesteps(LINEAR, 5, name), power)) for name in NAMED}
    assert bound <= min(named.values())
    if power != 1:  # log_snr is the optimum for some samplers otherwise.
        assert bound < 0.999 * min(named.values())


@pytest.mark.parametrize("schedule_name", ["linear", "cosine", "edm"])
def test_dmns_optimum_for_ddim_and_power_1_is_even_in_lambda(schedule_name: str) -> None:
    # The bound is a sum of e^h - 1 over steps h in lambda.
    schedule = SCHEDULES[schedule_name]
    problem = problem_of(gaussian(schedule), normals(1, 2), 7)
    torch.testing.assert_close(dmn_timesteps(problem, power=1.0), make_timesteps(schedule, 7, "log_snr"))
    h = schedule.marginal_lambda(make_timesteps(schedule, 7, "quadratic")).diff()
    bound = dmn_bound(problem, make_timesteps(schedule, 7, "quadratic"), 1.0, separate_steps=0)
    scale = schedule.marginal_std(problem.timesteps[-1])
    torch.testing.assert_close(bound, scale * torch.expm1(h).sum())


@pytest.mark.parametrize(
    "sampler", ["dpmpp_2m", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("ddim", "heun"))]
)
def test_dmn_finds_no_worse_a_grid_than_a_search_without_derivatives(sampler: str) -> None:
    problem = problem_of(small_mixture(), normals(1, 2), 4, sampler)
    ends = problem.timesteps[[0, -1]]

    def bound(inner: Any) -> float:
        lambdas = LINEAR.marginal_lambda(ends)
        grid = torch.cat([ends[:1], LINEAR.inverse_lambda(torch.as_tensor(inner)), ends[1:]])
        falling = (
            bool((torch.as_tensor(inner).diff() > 0.05).all()) and lambdas[0] < inner[0] and inner[-1] < lambdas[1]
        )
        return float(dmn_bound(problem, grid)) if falling else 1e9

    starts = [LINEAR.marginal_lambda(make_timesteps(LINEAR, 4, name))[1:-1].numpy() for name in NAMED]
    least = min(minimize(bound, start, method="Nelder-Mead", options={"maxiter": 200}).fun for start in starts)
    assert float(dmn_bound(problem, dmn_timesteps(problem))) < 1.01 * least


@pytest.mark.parametrize("sampler", WEIGHTS_OF)
def test_dmn_gives_samplers_whose_own_weights_mislead_it_those_of_dpm_solver(sampler: str) -> None:
    grids = [dmn_timesteps(problem_of(small_mixture(), normals(1, 2), 4, name)) for name in (sampler, "dpmpp_3m")]
    assert torch.equal(*grids)


# Refusals


def no_sampler(problem: TuningProblem) -> Tensor:
    return dmn_timesteps(dataclasses.replace(problem, step_fn=lambda x, t, s, t_ratio: (x, x)))


@pytest.mark.parametrize(
    ("call", "accepted"),
    [
        (lambda p: ays_timesteps(p, num_candidates=5), "num_candidates is 5; accepted for 5 steps: 6 or more"),
        (lambda p: gits_timesteps(p, num_candidates=0), "num_candidates is 0; accepted for 5 steps: 6 or more"),
        (lambda p: ays_timesteps(p, num_samples=0), "num_samples is 0; accepted: 1 or more"),
        (lambda p: gits_timesteps(p, max_samples=0), "max_samples is 0; accepted: 1 or more"),
        (lambda p: oss_timesteps(p, num_samples=0), "num_samples is 0; accepted: 1 or more"),
        (lambda p: gits_timesteps(p, discount=0.0), "discount is 0.0; accepted: above 0"),
        (lambda p: dmn_timesteps(p, power=-1.0), "power is -1.0; accepted: 0 or more"),
        (lambda p: dmn_timesteps(p, max_iters=0), "max_iters is 0; accepted: 1 or more"),
        (lambda p: ays_timesteps(dataclasses.replace(p, batch_size=0)), "batch_size is 0; accepted: 1 or more"),
        (no_sampler, "accepted: the step_fn of a Sampler, such as ddim's"),
        (lambda p: dp_path(torch.ones(3, 4), 1), "cost has shape (3, 4); accepted: square"),
        (lambda p: dp_path(torch.ones(4, 4), 4), "num_steps is 4; accepted: 1 to 3"),
        (lambda p: dp_path(torch.full((4, 4), torch.inf), 2), "no path of 2 hops has a finite cost"),
        (lambda p: ays_timesteps(dataclasses.replace(p, population=torch.full((8, 2), torch.nan))), "not a number"),
        (
            lambda p: oss_timesteps(dataclasses.replace(p, population=torch.full((8, 2), torch.nan))),
            "no path is finite",
        ),
    ],
)
def test_what_a_rival_cannot_do_is_refused_naming_what_is_accepted(
    call: Callable[[TuningProblem], Any], accepted: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(accepted)):
        call(problem_of(small_mixture(), normals(8, 2), 5))
