"""DC-Solver, PAS and LD3's relaxed start: against the plain sampler, other code's samples, and closed forms."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from scipy.optimize import minimize  # type: ignore[import-untyped]
from torch import Tensor

from tests.core.conftest import Recorded, crossed, normals, small_mixture
from tests.core.test_diffusers_parity import DIGITS, TO_T_MIN, VP, initial_x, ours, scheduler_of, their_grid, theirs
from tests.core.test_rivals import SCHEDULES, noise_of, problem_of
from timetuner_core import model_wrapper
from timetuner_core.grids import make_timesteps, teacher_timesteps
from timetuner_core.guided_model import Prediction
from timetuner_core.models.mixtures import gratings_mixture
from timetuner_core.rivals.dc_solver import dc_ratios, dc_sampler, dc_solver_table, step_of
from timetuner_core.rivals.pas import NUM_BASIS, PasCorrection, _Direction, pas_correction
from timetuner_core.rivals.trajectory import teacher_trajectory
from timetuner_core.samplers import SAMPLERS, Past, Sampler, sample
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.tuners import DcSolverTuner, EndToEndTuner, TunedSetting
from timetuner_core.tuning.end_to_end import _relaxed_distances, tune_end_to_end
from timetuner_core.tuning.problem import TuningProblem, TuningState

TABLES = [name for name, known in SAMPLERS.items() if known.facts.is_table_of_steps]
LINEAR = SCHEDULES["linear"]
ONES = torch.ones(6, dtype=torch.float64)


def sampled(sampler: Sampler, problem: TuningProblem, x_T: Tensor) -> Tensor:
    with torch.no_grad():
        step_fn = sampler.step_fn(problem.model_fn, problem.noise_schedule)
        return sample(step_fn, x_T, problem.timesteps, torch.ones(problem.num_steps, dtype=torch.float64))


# DC-Solver


@crossed(sampler=TABLES, schedule=SCHEDULES)
def test_dc_solver_is_its_sampler_where_all_ratios_are_1_and_a_table_whatever_they_are(
    sampler: str, schedule: Any
) -> None:
    mixture, base = small_mixture(schedule), SAMPLERS[sampler]
    problem = problem_of(mixture, noise_of(mixture, 4), 6, sampler)
    x_T = problem.population
    plain = sampled(base, problem, x_T)
    torch.testing.assert_close(sampled(dc_sampler(base, ONES), problem, x_T), plain, atol=1e-10, rtol=0)
    compensating = dc_sampler(base, torch.tensor([9.0, 9.0, 0.8, 1.1, 0.9, 1.2], dtype=torch.float64))
    own = sampled(compensating, problem, x_T)
    table = SolverTable.of_sampler(compensating, schedule, problem.timesteps)
    torch.testing.assert_close(sampled(table.sampler(sampler), problem, x_T), own, atol=1e-9, rtol=1e-9)
    assert float((own - plain).norm()) > 1e-3


class CompensatedUniPC(UniPCMultistepScheduler):
    """UniPC of diffusers, whose predictor finds the last of its model outputs moved along a parabola in time."""

    model_outputs: list[Any]
    grid: list[float]
    ratios: list[float]

    def multistep_uni_p_bh_update(self, *args: Any, **kwargs: Any) -> Tensor:
        self.past = [*getattr(self, "past", []), (self.grid[len(getattr(self, "past", []))], self.model_outputs[-1])]
        if len(self.past) > 2:
            (t_2, x0_2), (t_1, x0_1), (t, x0) = ((time, output.numpy()) for time, output in self.past[-3:])
            at = self.ratios[len(self.past) - 1] * (t - t_1) + t_1
            parabola = np.polyfit([t_2, t_1, t], [each.ravel() for each in (x0_2, x0_1, x0)], 2)
            moved = torch.from_numpy(parabola[0] * at**2 + parabola[1] * at + parabola[2]).reshape(x0.shape).float()
            self.past[-1] = (t, moved)
            self.model_outputs[-1] = moved
        predicted: Tensor = super().multistep_uni_p_bh_update(*args, **kwargs)  # type: ignore[misc]
        return predicted


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dc_solver_on_unipc_is_that_of_diffusers_with_its_outputs_compensated() -> None:
    scheduler, x_T = scheduler_of("UniPCMultistepScheduler", solver_order=2, **TO_T_MIN), initial_x()
    scheduler = CompensatedUniPC.from_config(scheduler.config)  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(8)
    grid = their_grid(scheduler, VP, VP.t_min)
    ratios = torch.tensor([1, 1, 0.7, 1.2, 1.1, 0.9, 0.8, 1.3], dtype=torch.float64)
    scheduler.grid, scheduler.ratios = grid.tolist(), ratios.tolist()
    expected = theirs(scheduler, DIGITS.network, x_T)
    actual = ours(dc_sampler(SAMPLERS["unipc_2"], ratios), DIGITS.network, VP, x_T, grid)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)
    plain = ours(SAMPLERS["unipc_2"], DIGITS.network, VP, x_T, grid)
    assert float((plain - expected).abs().max()) > 0.05


@pytest.mark.parametrize(("sampler", "grid"), [("ddim", "log_snr"), ("dpmpp_2m", "uniform"), ("unipc_2", "uniform")])
def test_each_compensated_step_ends_nearest_to_the_teacher(sampler: str, grid: Any) -> None:
    mixture = gratings_mixture()
    timesteps = make_timesteps(LINEAR, 6, grid)
    problem = problem_of(mixture, noise_of(mixture, 16).float(), timesteps, sampler, batch_size=8)
    ratios = dc_ratios(problem)
    assert ratios[:2].tolist() == [1, 1] and not bool((ratios[2:] == 1).any())
    trajectory = teacher_trajectory(problem, 100, 16)

    def distance(step: int, ratio: float) -> float:
        """After a step, along the path of the ratios before."""
        tried = ratios.clone()
        tried[step] = ratio
        cut = dataclasses.replace(problem, timesteps=problem.timesteps[: step + 2])
        x_s = sampled(dc_sampler(SAMPLERS[sampler], tried), cut, problem.population)
        return float((x_s - trajectory[step + 1]).square().mean())

    for step in range(2, 6):
        least = min(distance(step, float(ratios[step]) + change) for change in (-0.5, -0.2, -0.05, 0.05, 0.2, 0.5))
        assert distance(step, float(ratios[step])) <= least
    held_out = noise_of(mixture, 64, seed=5).float()
    taught = teacher_trajectory(dataclasses.replace(problem, population=held_out), 100, 64)[-1]
    table = dc_solver_table(problem)
    before, after = (
        float((sampled(each, problem, held_out) - taught).flatten(1).norm(dim=1).mean())
        for each in (SAMPLERS[sampler], table.sampler(sampler))
    )
    assert after < 0.9 * before


def test_dc_solvers_tuner_keeps_the_grid_and_asks_the_network_no_more_than_it_says() -> None:
    network = Recorded(small_mixture())
    problem = problem_of(small_mixture(), normals(10, 2), 5, "dpmpp_2m", batch_size=4)
    model_fn = model_wrapper(network, LINEAR)
    step_fn = SAMPLERS["dpmpp_2m"].step_fn(model_fn, LINEAR)
    problem = dataclasses.replace(problem, model_fn=model_fn, step_fn=step_fn)
    tuner = DcSolverTuner(objective="dc_solver", batch_size=4, population_size=10, teacher_num_steps=23)
    state = TuningState.start(problem.timesteps)
    assert len(list(tuner.run(problem, state))) == 1 and bool(state.done.all()) and not list(tuner.run(problem, state))
    assert torch.equal(state.timesteps, problem.timesteps) and bool((state.t_ratios == 1).all())
    assert state.solver_table is not None and state.solver_table.num_calls == 5
    assert sum(network.batch_sizes) <= tuner.network_samples(TunedSetting(5)) < 1.2 * sum(network.batch_sizes)


@pytest.mark.parametrize(("sampler", "message"), [("ddpm", "adds noise"), ("heun", "once per step")])
def test_step_by_step_rivals_refuse_what_has_no_path_of_one_call_a_step(sampler: str, message: str) -> None:
    problem = problem_of(small_mixture(), normals(4, 2), 4, sampler)
    for rival in (dc_ratios, pas_correction):
        with pytest.raises(ValueError, match=message):
            rival(problem)


# PAS


def direction_after(problem: TuningProblem, num_before: int) -> _Direction:
    """The direction of a sampler's step, after some before."""
    x, history = problem.population, tuple[Past, ...]()
    for number, (t, s) in enumerate(itertools.pairwise(problem.timesteps)):
        sampler: Any = problem.step_fn.sampler  # type: ignore[attr-defined]
        remembered = history[-sampler.history_length :] if sampler.history_length else ()
        x_s, x0 = problem.step_fn(x, t, s, history=remembered) if remembered else problem.step_fn(x, t, s)
        if number == num_before:
            step = step_of(problem, Prediction(x0, x0), x, t, s, history)  # The network is not asked again.
            return _Direction(step, x_s)
        history, x = (*history, Past(t, x, x0)), x_s
    raise AssertionError


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "ipndm"])
def test_pas_is_its_sampler_where_no_coordinate_is_changed(sampler: str) -> None:
    mixture = gratings_mixture()
    problem = problem_of(mixture, noise_of(mixture, 3), 6, sampler)
    plain = sampled(SAMPLERS[sampler], problem, problem.population)
    assert torch.equal(sampled(PasCorrection({}).sampler(SAMPLERS[sampler], 6), problem, problem.population), plain)
    # The coordinates of a single sample, which are its direction's length and 0, give its own step.
    alone = dataclasses.replace(problem, population=problem.population[:1])
    untouched = {k: (float(direction_after(alone, k).d.norm()), 0.0, 0.0, 0.0) for k in range(1, 6)}
    by_pas = sampled(PasCorrection(untouched).sampler(SAMPLERS[sampler], 6), alone, alone.population)
    torch.testing.assert_close(by_pas, plain[:1], atol=1e-8, rtol=0)


def test_pas_corrects_in_the_direction_and_three_principal_components() -> None:
    mixture = gratings_mixture()
    problem = problem_of(mixture, noise_of(mixture, 3), 6)
    basis = direction_after(problem, 4).basis
    torch.testing.assert_close(basis @ basis.mT, torch.eye(NUM_BASIS, dtype=torch.float64).expand(3, -1, -1))
    first = direction_after(problem, 1).basis  # z_T and two directions leave two components.
    assert first.norm(dim=2).tolist() == [pytest.approx([1, 1, 1, 0])] * 3
    noise = torch.exp(-LINEAR.marginal_lambda(problem.timesteps))
    x = problem.population
    rows = [x / LINEAR.marginal_alpha(problem.timesteps[0])]
    for t, s, hop in zip(problem.timesteps[:-2], problem.timesteps[1:-1], noise.diff(), strict=False):
        x_s, _ = problem.step_fn(x, t, s)
        rows.append((x_s / LINEAR.marginal_alpha(s) - x / LINEAR.marginal_alpha(t)) / hop)
        x = x_s
    for sample_number in range(3):
        of_sample = np.stack([row[sample_number].flatten().numpy() for row in rows])
        _, vectors = np.linalg.eigh(np.cov(of_sample.T))
        for vector in (*vectors.T[-3:], of_sample[-1] / np.linalg.norm(of_sample[-1])):
            inside = basis[sample_number].numpy() @ vector
            assert float(inside @ inside) == pytest.approx(1, abs=1e-6)


def test_pas_learns_coordinates_of_least_distance_and_gains_on_other_noise() -> None:
    mixture = gratings_mixture()
    timesteps = make_timesteps(LINEAR, 6, "log_snr")
    problem = problem_of(mixture, noise_of(mixture, 32).float(), timesteps, batch_size=32)
    correction = pas_correction(problem, num_samples=32)
    assert correction.coordinates and 0 not in correction.coordinates
    trajectory = teacher_trajectory(problem, 100, 32)
    first = min(correction.coordinates)
    direction = direction_after(problem, first)
    z_star = trajectory[first + 1].flatten(1).double() / float(direction.alpha[-1])

    def loss(coordinates: Any) -> float:
        return float((direction._ended(torch.tensor(coordinates, dtype=torch.float64)) - z_star).abs().mean())

    learned = correction.coordinates[first]
    least = minimize(loss, np.array(learned), method="Nelder-Mead", options={"maxiter": 600}).fun
    assert loss(learned) < 1.05 * least
    held_out = noise_of(mixture, 64, seed=5).float()
    taught = teacher_trajectory(dataclasses.replace(problem, population=held_out), 100, 64)[-1]
    before, after = (
        float((sampled(each, problem, held_out) - taught).flatten(1).norm(dim=1).mean())
        for each in (SAMPLERS["ddim"], correction.sampler(SAMPLERS["ddim"], 6))
    )
    assert after < 0.9 * before


def test_pas_refuses_a_start_without_signal() -> None:
    mixture = small_mixture(SCHEDULES["flow"])
    with pytest.raises(ValueError, match="starts without signal"):
        pas_correction(problem_of(mixture, noise_of(mixture, 4), 4))


# LD3's relaxed start


def test_a_relaxed_distance_is_that_of_the_nearest_start_within_the_ball() -> None:
    x_T, end = normals(5, 3), normals(5, 3, seed=1)
    away = (x_T - end).norm(dim=1)
    torch.testing.assert_close(_relaxed_distances(lambda x: (x - end).norm(dim=1), x_T, 0.3), away - 0.3)
    # Further than the end itself, the start stays: no sample is taken away from what it should meet.
    far = _relaxed_distances(lambda x: (x - end).norm(dim=1), x_T, float(3 * away.max()))
    torch.testing.assert_close(far, away)


def relaxed(**options: Any) -> TuningState:
    mixture = gratings_mixture()
    problem = problem_of(mixture, noise_of(mixture, 16).float(), 4, "dpmpp_2m", batch_size=8)
    state, teacher = TuningState.start(problem.timesteps), teacher_timesteps(LINEAR, 20)
    for _ in tune_end_to_end(problem, state, teacher, "timesteps", total_iters=6, lr=0.05, **options):
        pass
    return state


def test_a_relaxed_start_of_radius_0_is_none_and_a_larger_one_lowers_the_distance() -> None:
    plain = relaxed()
    none, small, large = (relaxed(relaxed_start=start) for start in (0.0, 1e-7, 0.2))
    assert torch.equal(none.timesteps, plain.timesteps) and torch.equal(none.loss, plain.loss)
    torch.testing.assert_close(small.timesteps, plain.timesteps, atol=1e-4, rtol=0)
    assert float(large.initial_loss.sum()) < 0.95 * float(plain.initial_loss.sum())
    torch.testing.assert_close(relaxed(relaxed_start=0.2, recompute=False).timesteps, large.timesteps)
    with pytest.raises(ValueError, match="relaxed_start is -1; accepted: 0 or more"):
        relaxed(relaxed_start=-1)


def test_the_cost_of_a_relaxed_start_is_told() -> None:
    network = Recorded(small_mixture())
    model_fn = model_wrapper(network, LINEAR)
    problem = problem_of(small_mixture(), normals(8, 2), 4, batch_size=8)
    problem = dataclasses.replace(problem, model_fn=model_fn, step_fn=SAMPLERS["ddim"].step_fn(model_fn, LINEAR))
    tuner = EndToEndTuner(relaxed_start=0.01, start="given", total_iters=3, batch_size=8, population_size=8)
    for _ in tuner.run(problem, TuningState.start(make_timesteps(LINEAR, 4)), target=normals(8, 2)):
        pass
    setting = TunedSetting(4)
    assert sum(network.batch_sizes) == tuner.network_samples(setting)
    assert tuner.samples_at_once(setting) == 2 * dataclasses.replace(tuner, relaxed_start=0.0).samples_at_once(setting)
