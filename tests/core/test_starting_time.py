"""The start of sampling: a network whose eps is a little wrong must not be asked where alpha_t is nearly 0."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.core.conftest import normals
from timetuner_core.catalog import GridName
from timetuner_core.clipping import Clipping
from timetuner_core.evaluation.distances import Frechet
from timetuner_core.evaluation.teacher_check import TeacherError, TeacherSamples, energy_distance
from timetuner_core.grids import make_timesteps, teacher_timesteps
from timetuner_core.models.diffusion_model import DiffusionModel
from timetuner_core.models.loading import load_builtin
from timetuner_core.models.schedulers import (
    ACCEPTED_SCHEDULERS,
    GRID_STAND_INS,
    read_scheduler_config,
    stock_scheduler,
    stock_timesteps,
)
from timetuner_core.noise_schedule import NoiseScheduleVP
from timetuner_core.samplers import get_sampler, initial_noise
from timetuner_core.sampling.generate import Guidance, generate
from timetuner_core.sampling.starting_time import MAX_X0_ERROR, find_starting_time
from timetuner_core.tuning_setup import Experiment

UNGUIDED = Guidance("uncond", 1.0)
SEEDS = list(range(512))


def imprecise(
    beta_schedule: str, error: float, clip_sample: bool = False
) -> tuple[DiffusionModel, Callable[[int], Tensor]]:
    """A network whose eps is wrong by `error`, on data that are known exactly, and diffusers' own sampling of it."""
    scheduler = diffusers.DDIMScheduler(beta_schedule=beta_schedule, clip_sample=clip_sample)
    schedule = NoiseScheduleVP("discrete", alphas_cumprod=scheduler.alphas_cumprod.double())
    builtin = load_builtin("mixture-gratings")
    assert builtin.mixture is not None
    mixture = replace(builtin.mixture, noise_schedule=schedule)
    direction = torch.randn(mixture.sample_shape, generator=torch.Generator().manual_seed(1))

    def network(x: Tensor, t_input: Tensor, condition: Tensor | None = None) -> Tensor:
        # The error is the same for all x in the main, and depends on x a little.
        return mixture(x, t_input, condition) + error * (direction + torch.sin(3 * x.flip(-1))) / 1.2

    model = replace(
        builtin,
        network=network,
        noise_schedule=schedule,
        mixture=None,
        clipping=Clipping(1.0) if clip_sample else None,
        stock_timesteps=lambda num_steps: stock_timesteps(dict(scheduler.config), num_steps),
    )

    def by_diffusers(num_steps: int) -> Tensor:
        scheduler.set_timesteps(num_steps)
        x, _ = initial_noise(model.sample_shape, SEEDS, 1.0)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(len(x)).float()), t, x).prev_sample
        return x

    return model, by_diffusers


@pytest.mark.parametrize(
    ("beta_schedule", "error", "num_steps", "clip_sample"),
    [
        ("squaredcos_cap_v2", 0.02, 10, False),
        ("squaredcos_cap_v2", 0.02, 10, True),
        ("linear", 0.06, 5, False),
        ("linear", 0.06, 5, True),
    ],
)
def test_samples_are_no_worse_than_diffusers(
    beta_schedule: str, error: float, num_steps: int, clip_sample: bool
) -> None:
    model, by_diffusers = imprecise(beta_schedule, error, clip_sample)
    start = find_starting_time(model)
    assert start.t < model.noise_schedule.T
    assert start.x0_error is not None and start.x0_error <= MAX_X0_ERROR
    model = model.starting_at(start.t)
    samples = generate(model, UNGUIDED, SEEDS, None, make_timesteps(model.noise_schedule, num_steps))
    assert model.reference is not None
    distance = Frechet.to(model.reference)
    assert distance(samples).value <= 1.2 * distance(by_diffusers(num_steps)).value
    assert float(samples.std()) == pytest.approx(float(model.reference.std()), rel=0.1)


def test_an_exact_network_starts_at_the_end_and_needs_one_call() -> None:
    for model in (load_builtin("mixture-gratings"), replace(load_builtin("mixture-gratings"), draw_data=None)):
        calls: list[int] = []
        start = find_starting_time(model.watched(calls.append))
        assert (start.t, len(calls)) == (model.noise_schedule.T, 1)


def test_without_data_a_teachers_samples_tell_where_to_start() -> None:
    model, _ = imprecise("squaredcos_cap_v2", 0.02)
    with_data = find_starting_time(model)
    without = find_starting_time(replace(model, draw_data=None))
    assert without.t == pytest.approx(with_data.t, abs=0.03)


def test_predictions_that_alpha_does_not_divide_start_at_the_end() -> None:
    model, _ = imprecise("squaredcos_cap_v2", 0.5)
    assert find_starting_time(replace(model, model_type="v")) == (model.noise_schedule.T, None)


@pytest.mark.parametrize("grid", ["default", "uniform", "quadratic", "log_snr", "edm"])
def test_named_grids_and_teachers_start_there(grid: GridName) -> None:
    schedule = NoiseScheduleVP("linear").starting_at(0.9)
    assert float(make_timesteps(schedule, 6, grid)[0]) == 0.9
    assert float(teacher_timesteps(schedule, 50)[0]) == 0.9
    for wrong in (0.0, 1e-4, 1.5):
        with pytest.raises(ValueError, match=r"t_start is .*; accepted: above 0.001, up to 1.0"):
            schedule.starting_at(wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ACCEPTED_SCHEDULERS)
def test_the_stock_grid_tells_the_network_what_the_class_tells_it(name: str) -> None:
    """Each class by itself, with its own defaults."""
    scheduler_class: Any = getattr(diffusers, GRID_STAND_INS.get(name, name))
    grid = stock_timesteps({"_class_name": name}, 6)
    assert grid is not None
    assert len(grid) == 7
    scheduler = scheduler_class()
    scheduler.set_timesteps(6)
    told = read_scheduler_config({"_class_name": name}).noise_schedule.model_input_time(grid[:-1])
    given = scheduler.timesteps.double().unique().flip(0)
    torch.testing.assert_close(told, given, atol=1e-3, rtol=1e-4)


def test_no_stock_grid_where_diffusers_needs_to_know_more() -> None:
    dynamic = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    assert stock_timesteps(dynamic, 5) is None
    assert stock_timesteps({"_class_name": "DDIMScheduler", "num_train_timesteps": 10}, 11) is None


@pytest.mark.parametrize("name", ["PNDMScheduler", "KDPM2DiscreteScheduler"])
def test_what_stands_in_for_a_scheduler_clips_nothing_that_the_scheduler_does_not(name: str) -> None:
    scheduler = stock_scheduler({"_class_name": name, "clip_sample": True, "thresholding": True, "beta_end": 0.012})
    assert scheduler.config.beta_end == 0.012
    assert not scheduler.config.clip_sample
    assert not scheduler.config.get("thresholding")


def test_the_energy_distance_of_two_gaussians() -> None:
    """The closed form in one dimension, of N(0, 1) and N(1, 2**2), by the mean of a folded normal."""

    def mean_distance(mean: float, variance: float) -> float:
        std = math.sqrt(variance)
        return std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * variance)) + mean * math.erf(
            mean / std / math.sqrt(2)
        )

    exact = 2 * mean_distance(1, 5) - mean_distance(0, 2) - mean_distance(0, 8)
    x, y = normals(2000, 1), 1 + 2 * normals(2000, 1, seed=1)
    assert energy_distance(x, y) == pytest.approx(exact / mean_distance(0, 8), abs=0.02)
    assert energy_distance(x[:1000], x[1000:]) == pytest.approx(0, abs=0.02)
    assert energy_distance(x, x + 1e-6, same_noise=True) == pytest.approx(0, abs=1e-6)


def check_teacher(model: DiffusionModel, teacher_num_steps: int = 40, guidance: Guidance = UNGUIDED) -> None:
    Experiment(model, guidance, get_sampler("ddim")).check_teacher(teacher_num_steps)


def test_a_teacher_from_the_end_is_refused_and_one_from_the_found_start_is_not() -> None:
    model, _ = imprecise("squaredcos_cap_v2", 0.02)
    with pytest.raises(TeacherError, match=r"with half its steps its samples are others: .* accepted: up to 0.5"):
        check_teacher(model)
    good = model.starting_at(find_starting_time(model).t)
    check_teacher(good)
    with pytest.raises(TeacherError, match=r"its samples are not distributed as the data: .* accepted: up to 0.15"):
        check_teacher(replace(good, reference=model.reference * 3))


def test_what_a_teacher_is_held_against() -> None:
    x, wide, other = normals(64, 9), 3 * normals(64, 9), normals(64, 9, seed=1)
    TeacherSamples(x, by_half=x + 0.1, from_later=x + 0.1, by_stock=x + 0.1, data=other).check()
    TeacherSamples(x, by_stock=wide).check()  # Diffusers' own grid is the bad one.
    for bad, reason in (
        (TeacherSamples(x * torch.nan), "its samples are not finite"),
        (TeacherSamples(x, by_half=other), "with half its steps its samples are others"),
        (TeacherSamples(x, from_later=wide), "from another starting time its samples are distributed otherwise"),
        (TeacherSamples(wide, by_stock=x), "its samples are not distributed as those of diffusers' own time grid"),
        (TeacherSamples(wide, data=other), "its samples are not distributed as the data"),
    ):
        with pytest.raises(TeacherError, match=reason):
            bad.check()


@pytest.mark.parametrize("name", ["digits8", "mixture-ring"])
def test_good_teachers_pass(name: str) -> None:
    check_teacher(load_builtin(name), 10, Guidance("classifier-free", 2.0))


def test_a_schedule_worse_than_diffusers_own_grid_is_rejected() -> None:
    """It is better than our default grid, which is bad here, and that alone had it accepted."""
    model, _ = imprecise("squaredcos_cap_v2", 0.02)
    experiment = Experiment(model, UNGUIDED, get_sampler("ddim"))
    better = make_timesteps(model.noise_schedule.starting_at(0.99), 5)
    evaluation = experiment.evaluate(better, torch.ones(5, dtype=torch.float64), 128, 40)
    frechet = evaluation.metrics["frechet"]
    assert frechet.stock is not None
    assert frechet.stock < frechet.after < frechet.before
    assert not evaluation.better
    assert "worse than diffusers' own time grid, which has" in evaluation.reason
