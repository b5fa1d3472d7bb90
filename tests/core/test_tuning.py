"""Tuners: exact derivatives, independence of the steps, resuming, and ratios that serve better than ones."""

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.core.conftest import (
    DEVICES,
    Network,
    Recorded,
    crossed,
    linear_betas,
    normals,
    small_mixture,
    tiny_unet,
    tuner_of,
)
from timetuner_core import NoiseScheduleVP, TimeTuner
from timetuner_core.evaluation.distances import teacher_l2
from timetuner_core.grids import make_timesteps
from timetuner_core.models.mixtures import GaussianMixture, ring_mixture
from timetuner_core.samplers import SAMPLERS
from timetuner_core.tuning.end_to_end import tune_end_to_end
from timetuner_core.tuning.gauss_newton import COARSE_BATCHES, GaussNewton
from timetuner_core.tuning.per_step import tune_per_step
from timetuner_core.tuning.problem import TuningProblem, TuningState
from timetuner_core.tuning.solver import tune_solver

LINEAR = NoiseScheduleVP("linear")
LABELS, NULL = torch.tensor([0, 1, 1, 0]), torch.tensor([2])

Tune = Callable[[TuningProblem, TuningState], Iterator[TuningState]]


def parallel(problem: TuningProblem, state: TuningState) -> Iterator[TuningState]:
    return tune_per_step(problem, state, "next_eps", "parallel", "adam", lr=0.01, total_iters=6)


def sequential(problem: TuningProblem, state: TuningState) -> Iterator[TuningState]:
    return tune_per_step(problem, state, "next_eps", "sequential", "adam", lr=0.01, total_iters=6)


def end_to_end(problem: TuningProblem, state: TuningState) -> Iterator[TuningState]:
    teacher_timesteps = TimeTuner(problem.model_fn, LINEAR).get_timesteps(12)
    return tune_end_to_end(problem, state, teacher_timesteps, lr=0.01, total_iters=6)


def grid_end_to_end(problem: TuningProblem, state: TuningState) -> Iterator[TuningState]:
    schedule = problem.noise_schedule
    starts = [make_timesteps(schedule, problem.num_steps, name) for name in ("uniform", "log_snr")]
    teacher_timesteps = make_timesteps(schedule, 12)
    return tune_end_to_end(problem, state, teacher_timesteps, "both", lr=0.01, total_iters=6, starts=starts)


def gauss_newton(problem: TuningProblem, state: TuningState) -> Iterator[TuningState]:
    return tune_per_step(problem, state, "next_eps", "parallel", total_iters=12)


def gauss_newton_sequential(problem: TuningProblem, state: TuningState) -> Iterator[TuningState]:
    return tune_per_step(problem, state, "teacher_step", "sequential", total_iters=12, substeps=3)


def solver(problem: TuningProblem, state: TuningState) -> Iterator[TuningState]:
    step_fn = TimeTuner(problem.model_fn, LINEAR).step_fn("dpmpp_2m")
    starts = [make_timesteps(LINEAR, problem.num_steps, name) for name in ("uniform", "log_snr")]
    problem = dataclasses.replace(problem, step_fn=step_fn)
    return tune_solver(problem, state, make_timesteps(LINEAR, 12), total_iters=6, starts=starts)


EVERY_TUNER = [parallel, sequential, end_to_end, grid_end_to_end, gauss_newton, gauss_newton_sequential, solver]
every_tuner = pytest.mark.parametrize("tune", EVERY_TUNER)
both_types = pytest.mark.parametrize("tune_type", ["parallel", "sequential"])


def small_problem(
    network: Network | None = None, timesteps: Tensor | None = None, seed: int = 0, **step_kwargs: Any
) -> TuningProblem:
    """Five steps on a mixture; its population serves as data and as initial noise alike."""
    tuner = tuner_of(network or small_mixture(), LINEAR)
    grid = tuner.get_timesteps(5) if timesteps is None else timesteps
    step_fn = tuner.ddim_step_fn
    return TuningProblem(
        tuner.model_fn, LINEAR, step_fn, grid, normals(24, 2), batch_size=4, seed=seed, step_kwargs=step_kwargs
    )


def small_start() -> TuningState:
    return TuningState.start(small_problem().timesteps)


def run(tuned: Iterator[TuningState]) -> TuningState:
    *_, last = tuned
    return last


def tensors_of(state: TuningState) -> dict[str, Tensor]:
    """All numbers of a state, by name."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    table = fields.pop("solver_table")
    return fields if table is None else fields | {"a": table.a, "b": table.b}


@cache
def finished(tune: Tune) -> TuningState:
    """The end of a tuner's run on the small problem; not to be changed."""
    return run(tune(small_problem(), small_start()))


def loader(images: Tensor, batch_size: int = 8, labels: Tensor | None = None) -> list[Mapping[str, Tensor]]:
    rows = range(0, len(images), batch_size)
    if labels is None:
        return [{"image": images[i : i + batch_size]} for i in rows]
    return [{"image": images[i : i + batch_size], "label": labels[i : i + batch_size]} for i in rows]


# The place of the work


@every_tuner
@pytest.mark.parametrize("device", DEVICES)
def test_a_tuner_works_where_the_population_is(tune: Tune, device: str) -> None:
    def tuned(device: str) -> TuningState:
        problem = small_problem(small_mixture().to(device))
        problem = dataclasses.replace(problem, population=problem.population.to(device))
        return run(tune(problem, small_start()))

    state = tuned(device)
    assert {value.device.type for value in tensors_of(state).values()} == {"cpu"}
    torch.testing.assert_close(tensors_of(state), tensors_of(finished(tune)), equal_nan=True)


# A step's derivative


def tiny_unet_network() -> Network:
    unet = tiny_unet(num_class_embeds=3).double()

    def network(x: Tensor, t_input: Tensor, labels: Tensor | None = None) -> Tensor:
        labels = torch.full((len(x),), 2) if labels is None else labels
        eps: Tensor = unet(x.reshape(-1, 1, 4, 4), 10 * t_input, class_labels=labels).sample
        return eps.reshape(x.shape)

    return network


# A U-Net's time embedding is computed in float32, so that its differences need a wider step and bound.
NETWORKS: dict[str, tuple[Callable[[], Network], int, float, float]] = {
    "mixture": (small_mixture, 2, 1e-5, 1e-7),
    "unet": (tiny_unet_network, 16, 1e-3, 1e-3),
}


@crossed(guidance_type=["uncond", "classifier", "classifier-free"], eta=[0.0, 1.0], network=list(NETWORKS))
def test_derivative_of_a_step_in_its_ratio_is_exact(guidance_type: Any, eta: float, network: str) -> None:
    make_network, dimension, delta, tolerance = NETWORKS[network]
    classifier = small_mixture().log_class_posterior
    tuner = tuner_of(
        make_network(),
        LINEAR,
        guidance_type=guidance_type,
        guidance_scale=2.0,
        classifier_fn=lambda x, t_input, labels: classifier(x[:, :2], t_input, labels),
    )
    t, s = (torch.tensor(time, dtype=torch.float64) for time in (0.6, 0.4))
    x, noise = normals(4, dimension), normals(4, dimension, seed=1)

    def step(t_ratio: Tensor) -> Tensor:
        conditions = {"condition": LABELS, "uncond_condition": NULL}
        return torch.stack(tuner.ddim_step_fn(x, t, s, t_ratio=t_ratio, eta=eta, noise=noise, **conditions))

    ratio = torch.tensor(0.95, dtype=torch.float64, requires_grad=True)
    differences = (step(ratio + delta) - step(ratio - delta)).detach() / (2 * delta)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no forward mode
        _, forward = torch.func.jvp(step, (ratio.detach(),), (torch.ones_like(ratio),))
    weights = normals(*differences.shape, seed=2)
    (reverse,) = torch.autograd.grad((weights * step(ratio)).sum(), ratio)
    scale = float(differences.abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(forward, differences, atol=tolerance * scale, rtol=0)
    torch.testing.assert_close(reverse, (weights * forward).sum(), atol=1e-5 * scale, rtol=1e-6)


# The published objective


def test_each_step_tuned_with_fewer_others_gets_the_same_ratio_in_parallel() -> None:
    grid = small_problem().timesteps
    together = run(parallel(small_problem(), small_start())).t_ratios
    for num_steps in range(2, 5):  # a grid's first steps, of which the last is not tuned
        fewer = small_problem(timesteps=grid[: num_steps + 1])
        ratios = run(parallel(fewer, TuningState.start(fewer.timesteps))).t_ratios
        torch.testing.assert_close(ratios[:-1], together[: num_steps - 1], atol=1e-12, rtol=0)


@crossed(eta=[0.0, 1.0], tune_type=["parallel", "sequential"])
def test_the_last_step_alone_keeps_its_ratio(tune_type: Any, eta: float) -> None:
    problem = small_problem(eta=eta)
    state = TuningState.start(problem.timesteps)
    ratios = run(tune_per_step(problem, state, "next_eps", tune_type, "adam", lr=0.01, total_iters=3)).t_ratios
    assert (ratios != 1.0).tolist() == [True] * 4 + [False]


@both_types
def test_a_single_step_has_nothing_to_tune(tune_type: Any) -> None:
    tuner = tuner_of(Recorded(small_mixture()), LINEAR)
    ratios = tuner.optimize_timesteps(loader(normals(4, 2)), tuner.ddim_step_fn, num_steps=1, tune_type=tune_type)
    assert ratios.tolist() == [1.0]


def network_rows(num_steps: int, tune_type: Any) -> int:
    network = Recorded(small_mixture())
    tuner = tuner_of(network, LINEAR)
    tuner.optimize_timesteps(
        loader(normals(24, 2)), tuner.ddim_step_fn, num_steps=num_steps, tune_type=tune_type, total_iters=3
    )
    return sum(network.batch_sizes)


@both_types
def test_cost_is_linear_in_the_number_of_steps(tune_type: Any) -> None:
    rows = [network_rows(num_steps, tune_type) for num_steps in (2, 4, 6, 8)]
    first, *others = [after - before for before, after in itertools.pairwise(rows)]
    assert others == [first, first]


def test_parallel_tuning_is_one_network_batch_for_all_steps() -> None:
    network = Recorded(small_mixture())
    run(parallel(small_problem(network), small_start()))
    assert set(network.batch_sizes) == {4 * 4}


@both_types
def test_tuning_lowers_the_objective_on_fresh_data(tune_type: Any) -> None:
    mixture = small_mixture()
    tuner = tuner_of(mixture, LINEAR)
    x0, _ = mixture.sample(4096, torch.Generator().manual_seed(0))
    ratios = tuner.optimize_timesteps(
        loader(x0, 256), tuner.ddim_step_fn, num_steps=5, tune_type=tune_type, lr=0.02, total_iters=50
    )
    x0, _ = mixture.sample(4096, torch.Generator().manual_seed(1))
    grid, z, total = tuner.get_timesteps(5), normals(4096, 2), torch.zeros(2)
    x_t = LINEAR.marginal_alpha(grid[0]) * x0 + LINEAR.marginal_std(grid[0]) * z
    for t, s, ratio in zip(grid[:-2], grid[1:-1], ratios[:-1], strict=True):
        if tune_type == "parallel":
            x_t = LINEAR.marginal_alpha(t) * x0 + LINEAR.marginal_std(t) * z
        tuned, _ = tuner.ddim_step_fn(x_t, t, s, t_ratio=ratio)
        untuned, _ = tuner.ddim_step_fn(x_t, t, s)
        eps = tuner.model_fn(x_t, t)
        after, before = ((eps - tuner.model_fn(x_s, s)).square().sum(dim=1).mean() for x_s in (tuned, untuned))
        assert after < 1.01 * before  # Adam's noise remains where nothing is to be gained.
        total += torch.stack([after, before])
        x_t = tuned
    assert total[0] < 0.9 * total[1]


def test_classifier_free_tuning_runs_on_the_labels_of_the_data() -> None:
    mixture = small_mixture()
    x0, labels = mixture.sample(24, torch.Generator().manual_seed(0))

    def tuned(labels: Tensor) -> Tensor:
        tuner = tuner_of(mixture, LINEAR, guidance_type="classifier-free", guidance_scale=2.0)
        return tuner.optimize_timesteps(
            loader(x0.double(), 8, labels), tuner.ddim_step_fn, num_steps=4, total_iters=5, uncond_condition=NULL
        )

    assert bool(tuned(labels).isfinite().all())
    assert not torch.equal(tuned(labels), tuned(1 - labels))


# Gauss-Newton


def test_gauss_newton_solves_a_linear_least_squares_problem_at_once() -> None:
    slope, offset = normals(1, 40, 3), normals(1, 40, 3, seed=1)
    bound = torch.tensor([9.0], dtype=torch.float64)
    estimate = GaussNewton(torch.zeros(1, 6, dtype=torch.float64), -bound, bound, 0)
    ratios = -(slope * offset).sum() / slope.square().sum() * torch.ones(1, dtype=torch.float64) + 0.05
    low, high = estimate.around(ratios)
    estimate.add(torch.tensor([0]), low, high, *(slope * r + offset for r in (low, high)))
    best = ratios - 0.05
    torch.testing.assert_close(estimate.step(ratios), best, atol=1e-9, rtol=0)


def test_gauss_newton_is_as_unsure_as_least_squares_is() -> None:
    """The standard error, against the scatter of 400 estimates from 200 samples each."""
    bound = torch.full((400,), 9.0, dtype=torch.float64)
    estimate = GaussNewton(torch.zeros(400, 6, dtype=torch.float64), -bound, bound, 0)
    slope, noise = 2 + normals(400, 200, 1), 0.1 * normals(400, 200, 1, seed=1)
    low, high = estimate.around(torch.ones_like(bound))
    estimate.add(torch.arange(400), low, high, *(slope * (r[:, None, None] - 1) + noise for r in (low, high)))
    ratios = estimate.step(torch.ones_like(bound))
    claimed = estimate.standard_error(ratios).mean().item()
    assert claimed == pytest.approx(ratios.std().item(), rel=0.1)


def test_gauss_newton_looks_past_ripples_and_then_for_the_bottom_of_one() -> None:
    """A parabola around 0.9 whose slope is rippled, as a network's time embedding does it."""
    bounds = torch.zeros(1, dtype=torch.float64), 2 * torch.ones(1, dtype=torch.float64)
    ratios, memory, period = torch.ones(1, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.float64), 0.008

    def residual(r: Tensor) -> Tensor:
        return (r - 0.9 + 0.6 * period / (2 * torch.pi) * torch.sin(2 * torch.pi * (r - 0.9) / period))[:, None, None]

    for batches in range(40):
        estimate = GaussNewton(memory, *bounds, batches)
        low, high = estimate.around(ratios)
        estimate.add(torch.tensor([0]), low, high, residual(low), residual(high))
        ratios, memory = estimate.step(ratios), estimate.memory
        if batches + 1 == COARSE_BATCHES:
            assert abs(float(ratios) - 0.9) < period
    assert float(ratios) == pytest.approx(0.9, abs=1e-4)


@both_types
def test_gauss_newton_and_adam_find_the_same_ratios(tune_type: Any) -> None:
    mixture = small_mixture()
    problem = dataclasses.replace(small_problem(mixture), batch_size=256)
    x0, _ = mixture.sample(4096, torch.Generator().manual_seed(0))
    problem = dataclasses.replace(problem, population=x0.double())
    by_adam, by_gauss_newton = small_start(), small_start()
    for lr in (2e-2, 4e-3, 1e-3):  # annealed, as Adam's noise does not vanish
        by_adam.iterations.zero_()
        run(tune_per_step(problem, by_adam, "next_eps", tune_type, "adam", lr=lr, total_iters=50))
    run(tune_per_step(problem, by_gauss_newton, "next_eps", tune_type, tolerance=2e-3))
    assert float((by_adam.t_ratios - 1).abs().max()) > 0.05
    torch.testing.assert_close(by_gauss_newton.t_ratios, by_adam.t_ratios, atol=0.015, rtol=0)


def test_gauss_newtons_difference_quotient_is_the_forward_mode_derivative() -> None:
    tuner = tuner_of(small_mixture(), LINEAR)
    t, s = (torch.tensor(time, dtype=torch.float64) for time in (0.6, 0.4))
    x = normals(4, 2)

    def value(t_ratio: Tensor) -> Tensor:
        return tuner.model_fn(tuner.ddim_step_fn(x, t, s, t_ratio=t_ratio)[0], s)

    ratio = torch.ones(1, dtype=torch.float64)
    _, forward = torch.func.jvp(lambda r: value(r[0]), (ratio,), (torch.ones_like(ratio),))
    low, high = GaussNewton(torch.zeros(1, 6), ratio - 1, ratio + 1, 0).around(ratio)
    difference = (value(high[0]) - value(low[0])) / (high - low)
    torch.testing.assert_close(difference, forward, atol=2e-4 * float(forward.abs().max()), rtol=0)


def test_gauss_newton_stops_when_it_is_sure_enough() -> None:
    problem = small_problem()
    loose, tight = (
        run(tune_per_step(problem, small_start(), "next_eps", "parallel", tolerance=tolerance, total_iters=1000))
        for tolerance in (0.05, 0.01)
    )
    assert bool(loose.done.all()) and bool(tight.done.all())
    assert float(loose.iterations.sum()) < 0.5 * float(tight.iterations.sum())
    assert float(tight.iterations.max()) < 1000


@pytest.mark.parametrize("steps", [[0], [2, 1], [3]])
def test_steps_tuned_apart_get_the_ratios_of_all_in_one_batch(steps: list[int]) -> None:
    together = run(gauss_newton(small_problem(), small_start()))
    state = small_start()
    run(tune_per_step(small_problem(), state, "next_eps", "parallel", total_iters=12, steps=steps))
    torch.testing.assert_close(state.t_ratios[steps], together.t_ratios[steps], atol=1e-9, rtol=0)
    others = [i for i in range(4) if i not in steps]
    assert bool((state.t_ratios[others] == 1).all()) and not bool(state.done[others].any())


@both_types
def test_a_step_tuned_to_its_teacher_comes_closer_to_it(tune_type: Any) -> None:
    mixture = small_mixture()
    tuner = tuner_of(mixture, LINEAR)
    x0, _ = mixture.sample(2048, torch.Generator().manual_seed(0))
    problem = dataclasses.replace(small_problem(mixture), population=x0.double(), batch_size=128)
    state = run(tune_per_step(problem, small_start(), "teacher_step", tune_type, total_iters=30))
    grid, fresh, total = problem.timesteps, normals(2048, 2, seed=3), torch.zeros(2)
    for (t, s), ratio in zip(itertools.pairwise(grid), state.t_ratios.tolist(), strict=True):
        x_t = LINEAR.marginal_alpha(t) * x0 + LINEAR.marginal_std(t) * fresh
        teacher = tuner.sample(x_t, timesteps=torch.lerp(t, s, torch.linspace(0, 1, 9, dtype=torch.float64)))
        after, before = (
            teacher_l2(tuner.ddim_step_fn(x_t, t, s, t_ratio=r)[0], teacher).square().mean() for r in (ratio, 1.0)
        )
        assert after < 1.01 * before or tune_type == "sequential"  # Sequential tuning sees another population.
        total += torch.stack([after, before])
    assert total[0] < 0.8 * total[1]


# End to end


def held_out_distance(tuner: TimeTuner, num_steps: int, t_ratios: Tensor | None, x_T: Tensor) -> float:
    teacher = tuner.ddim_sample(x_T, 100)
    return float(teacher_l2(tuner.ddim_sample(x_T, num_steps, t_ratios=t_ratios), teacher).mean())


@pytest.mark.parametrize("make_mixture", [small_mixture, ring_mixture])
def test_end_to_end_tuning_brings_held_out_samples_closer_to_the_teacher(
    make_mixture: Callable[[], GaussianMixture],
) -> None:
    tuner = tuner_of(make_mixture(), LINEAR)
    ratios = tuner.optimize_end_to_end(normals(512, 2), tuner.ddim_step_fn, 5, batch_size=128, lr=0.02)
    held_out = normals(512, 2, seed=1)
    assert held_out_distance(tuner, 5, ratios, held_out) < 0.9 * held_out_distance(tuner, 5, None, held_out)


@pytest.mark.parametrize("parameters", ["t_ratios", "timesteps", "both"])
def test_only_the_parameters_asked_for_are_moved(parameters: Any) -> None:
    problem, state = small_problem(), small_start()
    run(tune_end_to_end(problem, state, make_timesteps(LINEAR, 12), parameters, total_iters=5))
    assert torch.equal(state.t_ratios, torch.ones_like(state.t_ratios)) == (parameters == "timesteps")
    assert torch.equal(state.timesteps, problem.timesteps) == (parameters == "t_ratios")
    assert torch.equal(state.timesteps[[0, -1]], problem.timesteps[[0, -1]])
    assert bool((state.timesteps[1:] < state.timesteps[:-1]).all())


def test_a_grid_and_ratios_tuned_together_beat_either_alone_on_held_out_noise() -> None:
    tuner = tuner_of(ring_mixture(), LINEAR)
    held_out, teacher = normals(512, 2, seed=1), tuner.ddim_sample(normals(512, 2, seed=1), 100)
    errors = {}
    for parameters in ("t_ratios", "timesteps", "both"):
        problem = dataclasses.replace(small_problem(ring_mixture()), population=normals(512, 2, seed=5), batch_size=128)
        state = small_start()
        run(tune_end_to_end(problem, state, make_timesteps(LINEAR, 100), parameters, lr=0.03))  # type: ignore[arg-type]
        samples = tuner.ddim_sample(held_out, timesteps=state.timesteps, t_ratios=state.t_ratios)
        errors[parameters] = float(teacher_l2(samples, teacher).mean())
    assert errors["both"] < min(errors["t_ratios"], errors["timesteps"])


def test_a_schedule_tuned_by_one_call_beats_tuned_ratios() -> None:
    tuner = tuner_of(ring_mixture(), LINEAR)
    x_T, held_out = normals(256, 2, seed=5), normals(512, 2, seed=1)
    options: Any = {"num_steps": 5, "batch_size": 128, "lr": 0.03, "total_iters": 40}
    timesteps, t_ratios = tuner.optimize_schedule(x_T, tuner.ddim_step_fn, **options)
    samples = tuner.ddim_sample(held_out, timesteps=timesteps, t_ratios=t_ratios)
    error = float(teacher_l2(samples, tuner.ddim_sample(held_out, 100)).mean())
    ratios = tuner.optimize_end_to_end(x_T, tuner.ddim_step_fn, **options)
    assert error < 0.5 * held_out_distance(tuner, 5, ratios, held_out)


def test_a_solver_learned_by_one_call_beats_a_tuned_schedule() -> None:
    tuner = tuner_of(ring_mixture(), LINEAR)
    x_T, held_out = normals(128, 2, seed=5), normals(512, 2, seed=1)
    teacher = tuner.ddim_sample(held_out, 100)
    options: Any = {"num_steps": 4, "batch_size": 16}
    timesteps, t_ratios, sampler = tuner.optimize_solver(x_T, total_iters=4, **options)
    by_solver = tuner.sample(held_out, timesteps=timesteps, t_ratios=t_ratios, sampler=sampler)
    timesteps, t_ratios = tuner.optimize_schedule(x_T, tuner.ddim_step_fn, total_iters=40, **options)
    by_schedule = tuner.ddim_sample(held_out, timesteps=timesteps, t_ratios=t_ratios)
    errors = [float(teacher_l2(samples, teacher).mean()) for samples in (by_solver, by_schedule)]
    assert errors[0] < 0.7 * errors[1]
    with pytest.raises(ValueError, match="adds noise"):
        tuner.optimize_solver(x_T, sampler="ddpm", **options)


def test_tuning_starts_from_the_best_of_the_grids_offered() -> None:
    problem, state = small_problem(ring_mixture()), small_start()
    tuner = tuner_of(ring_mixture(), LINEAR)
    starts = [make_timesteps(LINEAR, 5, name) for name in ("uniform", "quadratic", "log_snr", "edm")]
    teacher = tuner.ddim_sample(problem.population, 40)
    errors = [teacher_l2(tuner.ddim_sample(problem.population, timesteps=g), teacher).mean() for g in starts]
    best = starts[int(torch.stack(errors).argmin())]
    run(tune_end_to_end(problem, state, make_timesteps(LINEAR, 40), total_iters=2, starts=starts))
    assert torch.equal(state.timesteps, best)


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.stochastic])
def test_end_to_end_tuning_starts_from_the_distance_that_the_sampler_has(name: str) -> None:
    """Multistep samplers with their history, too."""
    tuner = tuner_of(small_mixture(), LINEAR)
    x_T = normals(1, 2).repeat(4, 1)
    problem = TuningProblem(tuner.model_fn, LINEAR, tuner.step_fn(name), tuner.get_timesteps(6), x_T, batch_size=4)
    state = next(s for s in end_to_end(problem, TuningState.start(problem.timesteps)) if s.iterations[0] == 1)
    few, many = (tuner.sample(x_T, num_steps, sampler=name) for num_steps in (6, 12))
    assert state.initial_loss.sum().item() == pytest.approx(teacher_l2(few, many).mean().item(), rel=1e-9)


@pytest.mark.parametrize("name", ["heun", "dpm_3", "dpmpp_2m"])
def test_ratios_keep_every_call_of_a_step_within_the_times_of_training(name: str) -> None:
    network = Recorded(small_mixture())
    tuner = tuner_of(network, LINEAR)
    step_fn, grid = tuner.step_fn(name), tuner.get_timesteps(4)
    lower, upper = TuningProblem(tuner.model_fn, LINEAR, step_fn, grid, normals(1, 2)).ratio_bounds()
    for bound in (lower, upper):
        tuner.sample(normals(1, 2), timesteps=grid, t_ratios=bound, sampler=name)
    assert LINEAR.t_min * (1 - 1e-6) <= min(network.times)
    assert max(network.times) <= LINEAR.T * (1 + 1e-6)


def test_tuning_leaves_no_gradients_in_a_network_that_was_not_frozen() -> None:
    network = tiny_unet().requires_grad_(True)
    schedule = NoiseScheduleVP("linear")
    tuner = tuner_of(lambda x, t: network(x, t).sample, schedule)
    x_T = torch.randn((2, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    tuner.optimize_end_to_end(x_T, tuner.ddim_step_fn, 2, teacher_num_steps=4, total_iters=1, batch_size=2)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_teacher_of_a_network_of_few_training_steps_takes_them_all() -> None:
    schedule = NoiseScheduleVP("discrete", betas=linear_betas(8))
    network = Recorded(small_mixture(schedule))
    tuner = tuner_of(network, schedule)
    tuner.optimize_end_to_end(normals(4, 2), tuner.ddim_step_fn, 2, total_iters=1, batch_size=4)
    assert len(network.calls) == 8 + 2 * 2  # the teacher's, and the step's twice, as they are recomputed


def test_end_to_end_tuning_needs_a_deterministic_sampler() -> None:
    with pytest.raises(ValueError, match="accepted, to be tuned end to end: a deterministic one"):
        run(end_to_end(small_problem(eta=1.0), small_start()))


# Every tuner


@every_tuner
def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(tune: Tune) -> None:
    state = small_start()
    stored = {stop: copy.deepcopy(state) for stop, _ in enumerate(tune(small_problem(), state), start=1)}
    for stop in (1, 4, 8, 14, 20):
        resumed = copy.deepcopy(stored.get(stop, state))
        for _ in tune(small_problem(), resumed):
            pass
        values = (tensors_of(state) for state in (resumed, finished(tune)))
        torch.testing.assert_close(*values, atol=0, rtol=0, equal_nan=True, msg=f"stopped after {stop}")


@every_tuner
def test_a_finished_run_is_not_run_again(tune: Tune) -> None:
    assert list(tune(small_problem(), copy.deepcopy(finished(tune)))) == []


@every_tuner
def test_the_seed_fixes_every_draw(tune: Tune) -> None:
    runs = finished(tune), *(run(tune(small_problem(seed=seed), small_start())) for seed in (0, 1))
    first, again, other = (torch.cat([state.t_ratios, state.timesteps]) for state in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@crossed(tune=EVERY_TUNER, sign=[1.0, -1.0])
def test_ratios_keep_conditioning_within_the_schedule(tune: Tune, sign: float) -> None:
    """A network that rewards ever later, or ever earlier, conditioning, at a learning rate out of all measure."""

    def network(x: Tensor, t_input: Tensor) -> Tensor:
        return x * torch.exp(sign * 3 * t_input)[:, None]

    problem = dataclasses.replace(small_problem(network), batch_size=8)
    state = small_start()
    if tune in (end_to_end, grid_end_to_end):
        parameters: Any = "t_ratios" if tune is end_to_end else "both"
        tuned = tune_end_to_end(problem, state, problem.timesteps[[0, 2, 5]], parameters, lr=5.0, total_iters=4)
    elif tune in (parallel, sequential):
        tune_type: Any = "parallel" if tune is parallel else "sequential"
        tuned = tune_per_step(problem, state, "next_eps", tune_type, "adam", lr=5.0, total_iters=4)
    else:
        tuned = tune(problem, state)
    conditioning = torch.stack([state.timesteps[:-1] * state.t_ratios for state in tuned])
    assert float(conditioning.min()) >= LINEAR.t_min * (1 - 1e-12)
    assert float(conditioning.max()) <= LINEAR.T * (1 + 1e-12)
    if "gauss_newton" not in tune.__name__:  # Adam does try
        assert not torch.equal(conditioning, conditioning.clamp(LINEAR.t_min + 1e-9, LINEAR.T - 1e-9))


# Input of users


def tuned_on(batches: Any, network: Network | None = None, step_fn: Any = None, **options: Any) -> Tensor:
    tuner = tuner_of(network or small_mixture(), LINEAR)
    options = {"num_steps": 4, "total_iters": 8, "lr": 0.01} | options
    return tuner.optimize_timesteps(batches, step_fn or tuner.ddim_step_fn, **options)


@both_types
def test_a_short_data_loader_does_not_end_tuning_early(tune_type: Any) -> None:
    short, long = Recorded(small_mixture()), Recorded(small_mixture())
    tuned_on(loader(normals(4, 2), 4), short, tune_type=tune_type)
    tuned_on(loader(normals(64, 2), 4)[:1] * 16, long, tune_type=tune_type, population_size=4)
    assert short.batch_sizes == long.batch_sizes
    iterations = 8 if tune_type == "parallel" else 8 * 3
    assert len(short.calls) >= 3 * iterations


def test_an_endless_data_loader_is_read_up_to_the_population_size() -> None:
    batches = loader(normals(16, 2), 8)
    endless = tuned_on(itertools.cycle(batches), population_size=16)
    assert torch.equal(endless, tuned_on(batches))


def test_the_encoder_is_applied_to_the_images() -> None:
    encoded = tuned_on(loader(normals(16, 2)))
    assert torch.equal(tuned_on(loader(3 * normals(16, 2)), encode_fn=lambda image: image / 3), encoded)


def test_a_users_own_step_plugs_in() -> None:
    mixture = small_mixture()
    tuner = tuner_of(mixture, LINEAR)

    def exponential_step(x: Tensor, t: Tensor, s: Tensor, t_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """DDIM, as DPM-Solver-1 writes it."""
        eps = tuner.model_fn(x, t * t_ratio)
        alpha_t, alpha_s, sigma_t, sigma_s = (
            coefficient(time).reshape(-1, 1)
            for coefficient in (LINEAR.marginal_alpha, LINEAR.marginal_std)
            for time in (t, s)
        )
        h = (LINEAR.marginal_lambda(s) - LINEAR.marginal_lambda(t)).reshape(-1, 1)
        return alpha_s / alpha_t * x - sigma_s * torch.expm1(h) * eps, (x - sigma_t * eps) / alpha_t

    batches = loader(normals(16, 2))
    for tune_type in ("parallel", "sequential"):
        own = tuned_on(batches, mixture, exponential_step, tune_type=tune_type)
        torch.testing.assert_close(own, tuned_on(batches, mixture, tune_type=tune_type), atol=1e-9, rtol=0)


def test_arguments_of_the_step_reach_every_call() -> None:
    ratios = [tuned_on(loader(normals(16, 2)), eta=eta) for eta in (0.0, 1.0)]
    assert not torch.equal(*ratios)


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"tune_type": "serial"}, "tune_type is 'serial'; accepted: sequential, parallel"),
        ({"total_iters": 0}, "total_iters is 0; accepted: 1 or more"),
        ({"batch_size": -1}, "batch_size is -1; accepted: 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; accepted: 1 or more"),
        ({"lr": 0.0}, "lr is 0.0; accepted: above 0"),
        ({"num_steps": 0}, "num_steps is 0; accepted: 1 or more"),
        ({"num_steps": None}, "give num_steps or timesteps"),
        ({"timesteps": [0.1, 0.9], "num_steps": None}, "timesteps must fall strictly within [0, 1.0]"),
    ],
)
def test_bad_tuning_arguments_are_refused_naming_what_is_accepted(options: dict[str, Any], accepted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(accepted)):
        tuned_on(loader(normals(16, 2)), **options)


def test_an_empty_data_loader_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted: at least one image"):
        tuned_on([])
