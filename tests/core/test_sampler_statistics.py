"""Samplers that add noise, and what holds for every sampler: calls, batches, grids, ratios, devices, names."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.conftest import DEVICES, Recorded, crossed, linear_betas, normals, small_mixture, tuner_of
from tests.packages import MIDPOINT, install
from timetuner_core import NoiseScheduleVP, model_wrapper
from timetuner_core.grids import make_timesteps
from timetuner_core.models.mixtures import GaussianMixture
from timetuner_core.noise_schedule import NoiseSchedule, NoiseScheduleEDM, NoiseScheduleFlow
from timetuner_core.samplers import SAMPLERS, Sampler, get_sampler, sample

DOCS = Path(__file__).parents[2] / "docs" / "samplers.md"
SCHEDULES: dict[str, NoiseSchedule] = {
    "discrete": NoiseScheduleVP("discrete", betas=linear_betas(1000)),
    "linear": NoiseScheduleVP("linear"),
    "cosine": NoiseScheduleVP("cosine"),
    "flow": NoiseScheduleFlow(),
    "edm": NoiseScheduleEDM(),
}
# Smaller steps add less error, so that enough steps leave only the Monte-Carlo error.
ADDING_NOISE = {"ddpm": (0.0, 500), "ddim": (1.0, 500), "dpmpp_2m_sde": (0.0, 120)}

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def samples_of(sampler: Sampler, mixture: GaussianMixture, x_T: Tensor, grid: Tensor, **step_kwargs: Any) -> Tensor:
    step_fn = sampler.step_fn(model_wrapper(mixture, mixture.noise_schedule), mixture.noise_schedule)
    ratios = step_kwargs.pop("t_ratios", torch.ones(len(grid) - 1))
    return sample(step_fn, x_T, grid, ratios, **step_kwargs)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@crossed(name=list(ADDING_NOISE), kind=list(SCHEDULES))
def test_samples_have_the_mean_and_covariance_of_the_mixture(name: str, kind: str) -> None:
    """Within four standard errors of 4000 samples: about 0.05 for a mean, 0.03 for a covariance."""
    num_samples, (eta, num_steps) = 4000, ADDING_NOISE[name]
    mixture = small_mixture(SCHEDULES[kind])
    grid = make_timesteps(SCHEDULES[kind], num_steps, "log_snr" if kind != "edm" else "edm")
    x_T, (generator,) = SCHEDULES[kind].prior_std * normals(num_samples, 2), seeded(1)
    x = samples_of(SAMPLERS[name], mixture, x_T, grid, eta=eta, generator=generator)

    mean = mixture.weights @ mixture.means
    deviations = mixture.means - mean
    covariance = (mixture.weights * deviations.T) @ deviations
    covariance += (mixture.weights * mixture.stds**2).sum() * torch.eye(2)
    products = torch.einsum("bi,bj->bij", x - mean, x - mean)
    mean_error = 4 * x.std(dim=0) / math.sqrt(num_samples)
    covariance_error = 4 * products.std(dim=0) / math.sqrt(num_samples)
    assert bool(((x.mean(dim=0) - mean).abs() < mean_error).all())
    assert bool(((products.mean(dim=0) - covariance).abs() < covariance_error).all())


@crossed(sampler=SAMPLERS, end=["t_min", "zero"])
def test_network_calls_are_counted_exactly(sampler: Sampler, end: str) -> None:
    schedule = NoiseScheduleVP("discrete", betas=linear_betas(12))
    for num_steps in range(1, 13):
        grid = make_timesteps(schedule, num_steps)
        if end == "zero":
            grid = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
        network = Recorded(small_mixture(schedule))
        step_fn = sampler.step_fn(model_wrapper(network, schedule), schedule)
        x = sample(step_fn, normals(2, 2), grid, torch.ones(num_steps), generator=seeded(1, 2))
        assert bool(x.isfinite().all())
        assert len(network.calls) == sampler.network_calls(grid), num_steps


@every_sampler
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(sampler: Sampler) -> None:
    mixture, x_T, grid = small_mixture(), normals(4, 2), make_timesteps(NoiseScheduleVP("linear"), 6)
    eta = 1.0 if sampler.takes_eta else 0.0
    together = samples_of(sampler, mixture, x_T, grid, eta=eta, generator=seeded(5, 6, 7, 8))
    for i, seed in enumerate((5, 6, 7, 8)):
        alone = samples_of(sampler, mixture, x_T[i : i + 1], grid, eta=eta, generator=seeded(seed))
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-9, rtol=0)


@crossed(sampler=SAMPLERS, kind=list(SCHEDULES))
def test_any_falling_times_are_a_grid_and_ratios_move_the_samples(sampler: Sampler, kind: str) -> None:
    schedule = SCHEDULES[kind]
    grid = schedule.T * torch.tensor([1.0, 0.97, 0.6, 0.599, 0.2, 0.03, 0.0], dtype=torch.float64)
    mixture, x_T = small_mixture(schedule), schedule.prior_std * normals(3, 2)
    plain = samples_of(sampler, mixture, x_T, grid, generator=seeded(1, 2, 3))
    ratios = torch.tensor([1.0, 0.98, 1.0, 1.02, 1.0, 1.0], dtype=torch.float64)
    moved = samples_of(sampler, mixture, x_T, grid, generator=seeded(1, 2, 3), t_ratios=ratios)
    assert bool(plain.isfinite().all())
    assert bool(((moved - plain).abs() > 1e-9).any(dim=1).all())


@pytest.mark.parametrize("name", [name for name, each in SAMPLERS.items() if not each.stochastic and each.order > 1])
def test_higher_order_beats_ddim_on_an_irregular_grid(name: str) -> None:
    """A grid of as many steps, whose lengths differ by a factor of up to six."""
    schedule = NoiseScheduleVP("linear")
    lengths = torch.tensor([1.0, 3.0, 0.5] * 20, dtype=torch.float64)
    lambdas = -1.5 + 3.0 * torch.cat([torch.zeros(1), lengths.cumsum(0)]) / lengths.sum()
    mixture, x_t, grid = small_mixture(), normals(16, 2), schedule.inverse_lambda(lambdas)
    exact = samples_of(
        SAMPLERS["dpm_3"], mixture, x_t, schedule.inverse_lambda(torch.linspace(-1.5, 1.5, 401).double())
    )

    def error(name: str) -> float:
        return float((samples_of(SAMPLERS[name], mixture, x_t, grid) - exact).norm(dim=1).mean())

    assert error(name) < 0.5 * error("ddim")


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@every_sampler
def test_samples_stay_on_their_device_while_times_are_on_the_cpu(sampler: Sampler, device: str) -> None:
    """`meta`, which has no numbers, refuses to mix with the CPU as a GPU does, and needs none."""
    schedule = NoiseScheduleVP("linear")
    step_fn = sampler.step_fn(model_wrapper(lambda x, t_input: x * t_input[:, None], schedule), schedule)
    x_T = torch.ones(3, 2, device=device)
    x = sample(step_fn, x_T, make_timesteps(schedule, 5), torch.ones(5), generator=seeded(1, 2, 3))
    assert (x.device.type, x.dtype) == (device, torch.float32)


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.takes_eta])
def test_eta_is_refused_by_samplers_without_it(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"eta is 0.5; accepted: 0 for the sampler {name!r}")):
        tuner_of(small_mixture(), NoiseScheduleVP("linear")).sample(normals(2, 2), 3, eta=0.5, sampler=name)


def test_an_unknown_sampler_is_refused_naming_all_that_are_known() -> None:
    with pytest.raises(ValueError, match=re.escape(f"sampler is 'plms'; accepted: {', '.join(SAMPLERS)}")):
        get_sampler("plms")


def test_an_installed_package_adds_a_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A midpoint rule of its own: DPM-Solver-2 by another name."""
    install(tmp_path, "own_midpoint", MIDPOINT)
    monkeypatch.syspath_prepend(tmp_path)
    tuner, x_T = tuner_of(small_mixture(), NoiseScheduleVP("linear")), normals(3, 2)
    own = tuner.sample(x_T, 6, sampler="own_midpoint", t_ratios=[0.99] * 6)
    torch.testing.assert_close(own, tuner.sample(x_T, 6, sampler="dpm_2", t_ratios=[0.99] * 6), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="deis, own_midpoint"):
        get_sampler("plms")


def test_an_entry_point_that_is_no_sampler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "no_sampler", "SAMPLER = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TypeError, match="entry point 'no_sampler:SAMPLER' gives a int; accepted: a Sampler"):
        get_sampler("no_sampler")


def docs_rows() -> dict[str, list[str]]:
    """The rows of the tables of `docs/samplers.md` whose first cell is a sampler's name."""
    cells = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in DOCS.read_text().splitlines()]
    rows = [row for row in cells if row and row[0] in SAMPLERS]
    return {name: list(itertools.chain(*(row[1:] for row in rows if row[0] == name))) for name in SAMPLERS}


@every_sampler
def test_the_docs_tell_each_samplers_order_and_calls(sampler: Sampler) -> None:
    order, calls, noise = docs_rows()[sampler.name][:3]
    assert (int(order), int(calls)) == (sampler.order, sampler.calls_per_step)
    assert noise == ("yes" if sampler.stochastic else "eta" if sampler.takes_eta else "no")


def test_every_test_that_the_docs_name_exists() -> None:
    named = set(re.findall(r"`(test_\w+)::(test_\w+)`", DOCS.read_text()))
    defined = {
        (path.stem, name)
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 10
    assert named <= defined, named - defined


@every_sampler
def test_the_docs_say_what_covers_each_sampler(sampler: Sampler) -> None:
    """Samplers by letters, each of which stands for a test."""
    letters = set(re.findall(r"^- \*\*([A-Z])\*\* `test_", DOCS.read_text(), re.MULTILINE))
    coverage = docs_rows()[sampler.name][-4:]
    assert all(coverage)
    assert set("".join(coverage)) - set(", ") <= letters
